"""Base and tuned tensors as float32, a piece at a time, and results back in their own dtype.

bfloat16 is the upper half of float32, so no library is needed for it; float16 and float32 are numpy's. Every value
of the three is exact in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_suite.checkpoints.source import DTYPE_BYTES, CheckpointError, Source

# Elements at a time: a piece's arrays fit into a core's second-level cache.
PIECE = 1 << 18
SIGNLESS = np.uint32(0x7FFF_FFFF)
_INFINITE = 0x7F80_0000

Floats = NDArray[np.float32]
Bits = NDArray[np.uint32]


class Piece(NamedTuple):
    """Consecutive elements of one tensor. `bits` is |delta| as an integer, which orders as the number does."""

    base: Floats
    delta: Floats
    bits: Bits


def pieces(base: Source, tuned: Source, name: str) -> Iterator[Piece]:
    """Both checkpoints' tensor `name` from its first element to its last, in row-major order.

    Raises CheckpointError where a value of either, or their difference, is not a finite number.
    """
    there, here = base.tensors[name], tuned.tensors[name]
    wide, width = DTYPE_BYTES[there.dtype], DTYPE_BYTES[here.dtype]
    count = here.size // width
    for begin in range(0, count, PIECE):
        size = min(PIECE, count - begin)
        old = to_float32(base.read(there, begin * wide, size * wide), there.dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            delta = to_float32(tuned.read(here, begin * width, size * width), here.dtype)
            delta -= old
        bits = delta.view(np.uint32) & SIGNLESS
        if bits.max() >= _INFINITE:
            at = begin + int(np.argmax(bits >= _INFINITE))
            raise CheckpointError(f"{name}: element {at} or its update is NaN or infinite")
        yield Piece(old, delta, bits)


def to_float32(raw: bytearray, dtype: str) -> Floats:
    """The numbers in `raw`, little-endian, in an array that may be written to."""
    if dtype == "BF16":
        bits = np.frombuffer(raw, "<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    if dtype == "F16":
        return np.frombuffer(raw, "<f2").astype(np.float32)
    return np.frombuffer(raw, "<f4")


def from_float32(values: Floats, dtype: str) -> NDArray[Any] | None:
    """Rounded to `dtype`, halves to even; None where a number does not fit. `values` are finite or too large."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        # Half of the last kept place, less one where that place is even: a tie goes to the even neighbour.
        bits = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
        if values.size and (bits & SIGNLESS).max() >= _INFINITE:
            return None
        return (bits >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        result = values.astype("<f2" if dtype == "F16" else "<f4", copy=False)
    return result if np.isfinite(result).all() else None
