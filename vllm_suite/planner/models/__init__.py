"""Models as shapes, read from a ``config.json``: what they weigh, what they cache, what a step of them computes."""
