"""The weight files of a result, decided before its first byte is written.

The same tensors give the same files, byte for byte of every header. An interrupted run therefore goes on exactly
where the plan says, and a different request is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_suite.checkpoints.source import DTYPE_BYTES

DEFAULT_SHARD_BYTES = 4 << 30
_DIGITS = re.compile(r"(\d+)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Entry:
    """A tensor of the result, made of the source tensors `sources`.

    `initialised`: no tensor of the model that was read, but one that is new in the result.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    initialised: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One weight file of the result: its complete header, then the data of `entries` in order."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """A whole result. `facts` is JSON and decides whether two runs make the same one."""

    shards: tuple[Shard, ...]
    config: dict[str, Any]
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of `facts`."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def entries(self) -> Iterator[Entry]:
        """The tensors of all shards."""
        return (entry for shard in self.shards for entry in shard.entries)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def index(self) -> dict[str, Any]:
        """`model.safetensors.index.json`."""
        return {
            "metadata": {"total_size": sum(entry.size for entry in self.entries)},
            "weight_map": {entry.name: shard.name for shard in self.shards for entry in shard.entries},
        }


def natural_order(name: str) -> tuple[Any, ...]:
    """Sort key of tensor names: embeddings, layers by number, then the rest."""
    rank = 0 if name.startswith("model.embed") else 1 if name.startswith("model.layers.") else 2
    return rank, [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]


def pack(entries: Sequence[Entry], limit: int) -> tuple[Shard, ...]:
    """Weight files of at most `limit` bytes of data each, in the order of `entries`; a larger tensor has its own."""
    packs: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not packs or entry.size > room:
            packs.append([])
            room = limit
        packs[-1].append(entry)
        room -= entry.size
    # Widest dtypes first, as the library writes them: every tensor stays aligned to its elements.
    packs = [sorted(entries, key=lambda e: -DTYPE_BYTES[e.dtype]) for entries in packs]
    total = len(packs)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    return tuple(Shard(name, _header(p), tuple(p)) for name, p in zip(names, packs, strict=True))


def size_in_bytes(text: str) -> int:
    """Bytes of a size such as ``4GiB`` or ``500MB``. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*(?:([KMG]I?)?B?)", text.strip().upper())
    size = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if size < 1:
        raise ValueError(f"{text!r} is no size such as 4GiB or 500MB")
    return size


def _header(entries: list[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
