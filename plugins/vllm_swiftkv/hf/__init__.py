"""SwiftKV models in plain transformers: for training, for reading checkpoints, and to check others against.

Importing this package imports nothing heavy; ``vllm_swiftkv.hf.modeling`` has the classes and
``vllm_swiftkv.hf.checkpoint`` reads and writes their folders.
"""
