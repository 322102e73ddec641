"""Ordinary checkpoints to SwiftKV checkpoints, tensor by tensor.

`source` reads the ordinary checkpoint and `layout` says which tensors it must have; `plan` decides, before a byte is
written, every tensor and file of the result; `output` writes them so that an interrupted run can go on; `verify`
reads the result back; `run` is the whole.
"""
