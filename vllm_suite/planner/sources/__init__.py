"""Where the time of an engine step comes from. One interface, `LatencySource`; each source is a file."""
