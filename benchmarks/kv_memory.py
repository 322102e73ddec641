"""The KV cache of an engine in this process as plain memory: its descriptors, its bytes, and iovecs over both."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np


def worker(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker


def layout(llm: Any) -> np.ndarray[Any, Any]:
    """Descriptors of this worker's KV cache: address, length, device."""
    half = worker(llm)
    return np.asarray(half.src_blocks_data)


def fill(llm: Any, seed: int | None) -> None:
    """Write every byte of the KV cache, so that no page is missing: random bytes, or zeros where seed is None."""
    rows = layout(llm)
    generator = np.random.default_rng(seed)
    for address, length, _ in rows:
        block = _memory(int(address), int(length))
        block[:] = 0 if seed is None else generator.integers(0, 256, len(block), dtype=np.uint8)


def checksum(llm: Any, descriptors: np.ndarray[Any, Any]) -> int:
    """Order-dependent sum over the bytes of some descriptors."""
    rows, total = layout(llm), 0
    for position, index in enumerate(descriptors):
        words = _memory(int(rows[index, 0]), int(rows[index, 1])).view(np.uint64)
        total = (total + (position + 1) * int(words.sum(dtype=np.uint64))) % (1 << 64)
    return total


def _memory(address: int, length: int) -> np.ndarray[Any, Any]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(address))


def regions(rows: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Adjacent descriptors joined."""
    joined: list[tuple[int, int]] = []
    for address, length, _ in sorted(rows.tolist()):
        if joined and joined[-1][0] + joined[-1][1] == address:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((address, length))
    return joined


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


def iovecs(rows: np.ndarray[Any, Any]) -> Any:
    return (Iovec * len(rows))(*((int(row[0]), int(row[1])) for row in rows))
