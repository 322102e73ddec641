"""The K largest of any number of updates, exactly, in two readings and a fixed amount of memory.

|delta| as a float32 orders as the integer of its bits does. The first reading counts the values of the upper bits,
which tells the upper bits of the K-th largest; the second counts the lower bits of those that share them, which tells
the rest. Of updates equal to the K-th, those first in the order of tensor name (by code point) and then of row-major
index are taken. A zero update is no update: it is never taken, even where fewer than K others exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vllm_dler.merge.deltas import Bits, Piece

Counts = NDArray[Any]
Read = Callable[[str], Iterable[Piece]]

BITS = 31
# Lower bits counted in the second reading. A tensor of its own: small tables, since there may be many tensors. The
# whole model: few, since each tensor has a table of them; it says how many of the equal ones are whose.
LOWER_OF_TENSOR = 15
LOWER_OF_MODEL = 11


class Cut(NamedTuple):
    """Which updates of one tensor are kept: those above `threshold` (bits of |delta|) and the first `ties` equal ones.

    `kept`: how many these are; `changed`: how many updates are not zero.
    """

    threshold: int
    ties: int
    kept: int
    changed: int


def quota(keep: float, elements: int) -> int:
    """K: `keep` of so many elements rounded down, and at least one, as in TIES's reference implementation.

    The share is the decimal number that was written: 0.29 of 100 is 29, where the binary product is less.
    """
    return max(1, int(Fraction(str(keep)) * elements)) if elements else 0


def cut_tensor(read: Read, name: str, elements: int, keep: float) -> Cut:
    """The K largest updates of one tensor."""
    return _cuts(read, {name: elements}, keep, LOWER_OF_TENSOR)[name]


def cut_model(read: Read, sizes: Mapping[str, int], keep: float) -> dict[str, Cut]:
    """The K largest updates of all tensors together; `sizes` are elements by name."""
    return _cuts(read, sizes, keep, LOWER_OF_MODEL)


def _cuts(read: Read, sizes: Mapping[str, int], keep: float, lower_bits: int) -> dict[str, Cut]:
    names = sorted(sizes)
    low = np.uint32(lower_bits)
    upper = np.zeros(1 << BITS - lower_bits, np.int64)
    changed: dict[str, int] = {}
    for name in names:
        zeros = 0
        for piece in read(name):
            _count(piece.bits >> low, upper)
            zeros += piece.bits.size - int(np.count_nonzero(piece.bits))
        changed[name] = sizes[name] - zeros
    # Zeros are counted too: below everything, they change nothing where more than K updates are none.
    k = quota(keep, sum(sizes.values()))
    if sum(changed.values()) <= k:
        return {name: Cut(0, 0, changed[name], changed[name]) for name in names}

    shared, left = _reach(upper, k)
    lower = np.zeros(1 << lower_bits, np.int64)
    mask = np.uint32(lower.size - 1)
    # By tensor: how many lie above the shared upper bits, and the lower bits' counts where there are any.
    above: dict[str, int] = {}
    counts: dict[str, Counts] = {}
    for name in names:
        above[name] = 0
        for piece in read(name):
            high = piece.bits >> low
            above[name] += int(np.count_nonzero(high > shared))
            inside = piece.bits[high == shared]
            if inside.size:
                _count(inside & mask, counts.setdefault(name, np.zeros_like(lower)))
        if name in counts:
            lower += counts[name]
            counts[name] = counts[name].astype(np.uint32)
    last, ties = _reach(lower, left)
    threshold = shared << lower_bits | last

    cuts: dict[str, Cut] = {}
    for name in names:
        here = counts.get(name)
        mine = 0 if here is None else min(ties, int(here[last]))
        beyond = above[name] + (0 if here is None else int(here[last + 1 :].sum(dtype=np.int64)))
        cuts[name] = Cut(threshold, mine, beyond + mine, changed[name])
        ties -= mine
    return cuts


def _count(values: Bits, table: Counts) -> None:
    """Add how often each value occurs."""
    if table.size > values.size:
        np.add.at(table, values, 1)
    else:
        table += np.bincount(values, minlength=table.size)


def _reach(counts: Counts, k: int) -> tuple[int, int]:
    """The bin of the `k`-th largest, and the how manieth of its bin that is. There are at least `k`."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
    above = int(from_top[place - 1]) if place else 0
    return counts.size - 1 - place, k - above


def kept(piece: Piece, threshold: int, ties: int) -> tuple[NDArray[np.bool_], int]:
    """Which updates of a piece are kept, and how many of the `ties` are still to be given out after it."""
    chosen = piece.bits > threshold
    if ties:
        equal = np.flatnonzero(piece.bits == threshold)[:ties]
        chosen[equal] = True
        ties -= equal.size
    return chosen, ties
