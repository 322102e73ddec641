"""Observed lengths of one key: a histogram with narrow bins, whose older weights fade."""

from __future__ import annotations

from array import array
from bisect import bisect_left

# 32 bins an octave: at most 3.2 % wide, and one for each length below 64.
_SUB_BITS = 5
_EXACT = 2 << _SUB_BITS
MAX_TOKENS = (1 << 24) - 1
MAX_BINS = _EXACT + (24 - _SUB_BITS - 1 << _SUB_BITS)
# Weights are kept relative to the newest one's, which grows; past this all are scaled down.
_RESCALE = 1e60
_NEGLIGIBLE = 1e-9


def bin_of(tokens: int) -> int:
    """Index of the bin that holds a length of 0 to `MAX_TOKENS`."""
    if tokens < _EXACT:
        return tokens
    shift = tokens.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (tokens >> shift)


class Sketch:
    """Weights and token sums of the occupied bins, exact and censored apart, ordered by bin.

    At most `MAX_BINS` bins of 34 bytes each. Not thread-safe.
    """

    __slots__ = ("bins", "censored", "censored_sums", "count", "exact", "exact_sums", "last", "unit")

    def __init__(self) -> None:
        self.bins = array("H")
        self.exact = array("d")
        self.exact_sums = array("d")
        self.censored = array("d")
        self.censored_sums = array("d")
        self.unit = 1.0  # weight of an observation made now; divide by it
        self.count = 0  # exact observations, without fading
        self.last = 0.0  # seconds, of the newest observation

    def add(self, tokens: int, censored: bool, growth: float, now: float) -> None:
        """Count one length; `growth` is what the weight of an observation grows by since the last one."""
        self.last = max(self.last, now)
        self.unit = unit = self.unit * growth
        bins = self.bins
        index = bin_of(tokens)
        at = bisect_left(bins, index)
        if at == len(bins) or bins[at] != index:
            bins.insert(at, index)
            for column in (self.exact, self.exact_sums, self.censored, self.censored_sums):
                column.insert(at, 0.0)
        if censored:
            self.censored[at] += unit
            self.censored_sums[at] += unit * tokens
        else:
            self.exact[at] += unit
            self.exact_sums[at] += unit * tokens
            self.count += 1
        if unit > _RESCALE:
            self.rescale()

    def rescale(self, faded: float = 1.0) -> None:
        """Make the newest weight `faded` and drop bins of which nothing is left."""
        scale = faded / self.unit
        kept = [at for at in range(len(self.bins)) if (self.exact[at] + self.censored[at]) * scale > _NEGLIGIBLE]
        self.bins = array("H", [self.bins[at] for at in kept])
        self.exact = array("d", [self.exact[at] * scale for at in kept])
        self.exact_sums = array("d", [self.exact_sums[at] * scale for at in kept])
        self.censored = array("d", [self.censored[at] * scale for at in kept])
        self.censored_sums = array("d", [self.censored_sums[at] * scale for at in kept])
        self.unit = 1.0

    def entries(self) -> list[tuple[float, float, float]]:
        """(tokens, exact weight, censored weight) in order of tokens, weights relative to a new observation's.

        The exact and the censored observations of a bin stand at their own means; of equal ones the exact come first.
        """
        out: list[tuple[float, float, float]] = []
        scale = 1.0 / self.unit
        for exact, exact_sum, censored, censored_sum in zip(
            self.exact, self.exact_sums, self.censored, self.censored_sums, strict=True
        ):
            first = (exact_sum / exact, exact * scale, 0.0) if exact else None
            second = (censored_sum / censored, 0.0, censored * scale) if censored else None
            if first and second and second[0] < first[0]:
                first, second = second, first
            if first:
                out.append(first)
            if second:
                out.append(second)
        return out
