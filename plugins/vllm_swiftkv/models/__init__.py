"""SwiftKV models on vLLM's own layers (arXiv 2410.03960, section 3).

A model runs in two compiled regions. The head runs the first layers over every token and one projection that
gives the keys and values of all later layers; these are written to the KV cache; then the tail runs the later
layers over the rows that will be sampled, or over every row where the skip is not armed.
"""
