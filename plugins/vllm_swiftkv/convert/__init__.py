"""Ordinary checkpoints to SwiftKV checkpoints, tensor by tensor.

`layout` says which tensors an ordinary checkpoint must have; `plan` decides, before a byte is written, every tensor
and file of the result; `data` gives their bytes; `verify` compares the result with the source; `run` is the whole.
Reading and writing are those of `vllm_suite.checkpoints`.
"""
