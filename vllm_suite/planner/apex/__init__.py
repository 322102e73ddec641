"""APEX (arXiv 2411.17651): its plan space, and its engine's rules to compare with its own outputs."""
