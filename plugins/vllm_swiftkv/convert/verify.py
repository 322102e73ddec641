"""Reads a converted checkpoint back, through the safetensors library, and compares it with the plan and the source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_suite.checkpoints.readback import check_structure
from vllm_suite.checkpoints.shards import Entry, Plan, Shard
from vllm_suite.checkpoints.source import CHUNK_BYTES, CheckpointError, Source, pread, read_header
from vllm_swiftkv.convert.errors import ConvertError

# Of a copied tensor: its first and last bytes, and as much at places that its name decides.
_SPOT_BYTES = 64 << 10
_SPOTS = 2
_MEAN_BYTES = 256 << 10


class VerificationError(ConvertError):
    """The written checkpoint is not what was planned."""


@dataclass
class Verified:
    """What was compared. Bytes are those of the result that were read."""

    tensors: int = 0
    copied_bytes: int = 0
    initialised_bytes: int = 0


def verify(folder: Path, plan: Plan, source: Source) -> Verified:
    """Every tensor present with its shape and dtype and no other, samples of the copied ones equal, the initialised
    ones equal as a whole to their teachers or their teachers' mean. Raises VerificationError."""
    try:
        check_structure(folder, plan)
    except CheckpointError as error:
        raise VerificationError(str(error)) from error
    done = Verified()
    for shard in plan.shards:
        _verify_shard(folder / shard.name, shard, source, done)
    return done


def _verify_shard(path: Path, shard: Shard, source: Source, done: Verified) -> None:
    begin = {name: tensor.begin for name, tensor in read_header(path)[1].items()}
    fd = os.open(path, os.O_RDONLY)
    try:
        for entry in shard.entries:
            if len(entry.sources) > 1:
                same = _is_mean(path, entry, source)
            else:
                # A group of one is initialised by copying.
                whole = [(at, min(CHUNK_BYTES, entry.size - at)) for at in range(0, entry.size, CHUNK_BYTES)]
                spots = whole if entry.initialised else list(_spots(entry))
                teacher = source.tensors[entry.sources[0]]
                pairs = (
                    (pread(fd, n, begin[entry.name] + at, path.name), source.read(teacher, at, n)) for at, n in spots
                )
                same = all(written == original for written, original in pairs)
                if not entry.initialised:
                    done.copied_bytes += sum(n for _, n in spots)
            if not same:
                raise VerificationError(f"{path}: {entry.name} differs from {' and '.join(entry.sources)}")
            done.tensors += 1
            done.initialised_bytes += entry.size if entry.initialised else 0
    finally:
        os.close(fd)


def _spots(entry: Entry) -> Iterator[tuple[int, int]]:
    """Positions and sizes to compare; the whole of a small tensor."""
    if entry.size <= (_SPOTS + 2) * _SPOT_BYTES:
        yield 0, entry.size
        return
    last = entry.size - _SPOT_BYTES
    yield 0, _SPOT_BYTES
    yield last, _SPOT_BYTES
    for i in range(_SPOTS):
        yield int.from_bytes(hashlib.sha256(f"{i} {entry.name}".encode()).digest()[:8]) % last, _SPOT_BYTES


def _is_mean(path: Path, entry: Entry, source: Source) -> bool:
    """Whether a tensor is the mean of its teachers; all of them read by the library, not by this package."""
    import torch
    from safetensors import safe_open

    with ExitStack() as files:

        def opened(file: Path, name: str) -> Any:
            return files.enter_context(safe_open(file, framework="pt")).get_slice(name)

        written = opened(path, entry.name)
        teachers = [opened(source.folder / source.tensors[name].file, name) for name in entry.sources]
        rows = max(1, entry.shape[0] * _MEAN_BYTES // max(entry.size, 1))
        for row in range(0, entry.shape[0], rows):
            total: Any = sum(teacher[row : row + rows].double() for teacher in teachers)
            part = written[row : row + rows]
            if not torch.equal(part, (total / len(teachers)).to(part.dtype)):
                return False
    return True
