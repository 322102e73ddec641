"""The bytes of a converted checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vllm_suite.checkpoints.disk import Piece
from vllm_suite.checkpoints.shards import Entry
from vllm_suite.checkpoints.source import CHUNK_BYTES, Source


def data_of(entry: Entry, source: Source) -> Iterable[Piece]:
    """The bytes of a tensor of the result, in pieces of at most `CHUNK_BYTES`."""
    tensors = [source.tensors[name] for name in entry.sources]
    return source.chunks(tensors[0]) if len(tensors) == 1 else _mean(entry, source)


def _mean(entry: Entry, source: Source) -> Iterator[memoryview]:
    """Element-wise mean, summed in double precision and rounded once to the tensors' own dtype."""
    import torch

    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.dtype]
    streams = [source.chunks(source.tensors[name], CHUNK_BYTES // 16) for name in entry.sources]
    for pieces in zip(*streams, strict=True):
        total = sum(torch.frombuffer(piece, dtype=dtype).double() for piece in pieces)
        yield (total / len(pieces)).to(dtype).view(torch.uint8).numpy().data
