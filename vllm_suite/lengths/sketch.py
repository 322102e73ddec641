"""Observed lengths of one key: a histogram with narrow bins, whose older weights fade."""

from __future__ import annotations

from array import array
from bisect import bisect_left

# 16 bins an octave: at most 6.3 % wide, and one for each length below 32.
_SUB_BITS = 4
_EXACT = 2 << _SUB_BITS
_MAX_BITS = 22
MAX_TOKENS = (1 << _MAX_BITS) - 1
MAX_BINS = _EXACT + ((_MAX_BITS - _SUB_BITS - 1) << _SUB_BITS)
# Weights are kept relative to the newest one's, which grows; past this all are scaled down.
_RESCALE = 1e60
_NEGLIGIBLE = 1e-9
_ROUNDING = 1e-9


def bin_of(tokens: int) -> int:
    """Index of the bin that holds a length of 0 to `MAX_TOKENS`."""
    if tokens < _EXACT:
        return tokens
    shift = tokens.bit_length() - _SUB_BITS - 1
    return (shift << _SUB_BITS) + (tokens >> shift)


def edges(index: int) -> tuple[int, int]:
    """Smallest and largest length that a bin holds."""
    if index < _EXACT:
        return index, index
    shift = (index >> _SUB_BITS) - 1
    low = (index - (shift << _SUB_BITS)) << shift
    return low, low + (1 << shift) - 1


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
        self.count = 0  # observations, without fading
        self.last = 0.0  # seconds, of the newest observation

    def add(self, tokens: int, censored: bool, growth: float, now: float) -> None:
        """Count one length; `growth` is what the weight of an observation grows by since the last one."""
        self.count += 1
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
        if unit > _RESCALE:
            self.rescale()

    def copy(self) -> Sketch:
        """Another with the same observations."""
        made = Sketch()
        made.bins = self.bins[:]
        made.exact, made.exact_sums = self.exact[:], self.exact_sums[:]
        made.censored, made.censored_sums = self.censored[:], self.censored_sums[:]
        made.unit, made.count, made.last = self.unit, self.count, self.last
        return made

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

    def absorb(self, other: Sketch, half_life_s: float | None) -> None:
        """Add another's observations, the newest of each weighing the same but for the time between them.

        The other's observations stay as they are. The order of the two does not matter.
        """
        last = max(self.last, other.last)
        columns: dict[int, list[float]] = {}
        for one in (self, other):
            one.rescale()
            faded = 2.0 ** -min((last - one.last) / half_life_s, 1000.0) if half_life_s and one.bins else 1.0
            for index, *values in zip(
                one.bins, one.exact, one.exact_sums, one.censored, one.censored_sums, strict=True
            ):
                held = columns.setdefault(index, [0.0] * 4)
                for column, value in enumerate(values):
                    held[column] += value * faded
        ordered = sorted(columns.items())
        self.bins = array("H", [index for index, _ in ordered])
        self.exact, self.exact_sums, self.censored, self.censored_sums = (
            array("d", [values[column] for _, values in ordered]) for column in range(4)
        )
        self.count += other.count
        self.last = last

    def entries(self) -> tuple[list[float], list[float], list[float]]:
        """Tokens in ascending order, exact and censored weight at each, relative to a new observation's.

        The exact and the censored observations of a bin stand at their own means; of equal ones the exact come first.
        """
        at: list[float] = []
        ended: list[float] = []
        cut: list[float] = []
        scale = 1.0 / self.unit
        for exact, exact_sum, censored, censored_sum in zip(
            self.exact, self.exact_sums, self.censored, self.censored_sums, strict=True
        ):
            if not censored:
                at.append(exact_sum / exact)
                ended.append(exact * scale)
                cut.append(0.0)
            elif not exact:
                at.append(censored_sum / censored)
                ended.append(0.0)
                cut.append(censored * scale)
            else:
                first, second = exact_sum / exact, censored_sum / censored
                # Equal ones differ by the rounding of their sums.
                late = second < first * (1.0 - _ROUNDING)
                at += (second, first) if late else (first, second)
                ended += (0.0, exact * scale) if late else (exact * scale, 0.0)
                cut += (censored * scale, 0.0) if late else (0.0, censored * scale)
        return at, ended, cut
