"""Whether recent traffic differs from what a plan was made for: by more than chance, and by enough to matter.

Two windows are compared, the reference and the recent one. Three tests share the false-alarm rate of a look evenly
(Bonferroni): the rate by a two-sided z-test whose variance is widened by the reference's index of dispersion, prompt
and output lengths by the two-sample Kolmogorov-Smirnov test on bucket counts, which with buckets errs to the quiet
side. A difference has to reach a floor as well, since with enough requests any difference is significant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from vllm_suite.planner.watch.window import Histogram, Window


@dataclass(frozen=True)
class Shift:
    """What shifted.

    Attributes:
        what: ``rate``, ``prompts`` or ``outputs``.
        before, after: requests per second, or mean tokens.
        size: relative change of the rate, or the largest distance of two distribution functions.
        score: the test's statistic over the value at which it is significant; above 1.
    """

    what: str
    before: float
    after: float
    size: float
    score: float

    def __str__(self) -> str:
        unit = "requests/s" if self.what == "rate" else "tokens on average"
        return f"{self.what}: {self.before:.4g} -> {self.after:.4g} {unit}"


@dataclass(frozen=True)
class ShiftTest:
    """The test and its settings.

    Attributes:
        false_alarms: probability that a look at unchanged traffic finds a shift, at most.
        rate_floor: least relative change of the rate.
        length_floor: least distance of two distribution functions of a length.
    """

    false_alarms: float = 0.001
    rate_floor: float = 0.15
    length_floor: float = 0.1

    def shifts(self, reference: Sequence[Window], recent: Sequence[Window]) -> list[Shift]:
        """All that is found; empty for unchanged traffic. Both need at least one window."""
        each = self.false_alarms / 3
        before, after = Window.joined(reference), Window.joined(recent)
        found = [
            self._rate(reference, before, after, each),
            self._lengths("prompts", before.prompts, after.prompts, each),
            self._lengths("outputs", before.outputs, after.outputs, each),
        ]
        return [shift for shift in found if shift is not None]

    def _rate(self, reference: Sequence[Window], before: Window, after: Window, level: float) -> Shift | None:
        if not before.requests:
            return Shift("rate", 0.0, after.rate, math.inf, math.inf) if after.requests else None
        # Of the null hypothesis, one rate for all.
        common = (before.requests + after.requests) / (before.seconds + after.seconds)
        spread = dispersion(reference)
        error = math.sqrt(spread * common * (1 / before.seconds + 1 / after.seconds))
        change = after.rate / before.rate - 1
        limit = NormalDist().inv_cdf(1 - level / 2)
        score = abs(after.rate - before.rate) / error / limit
        if score <= 1 or abs(change) < self.rate_floor:
            return None
        return Shift("rate", before.rate, after.rate, change, score)

    def _lengths(self, what: str, before: Histogram, after: Histogram, level: float) -> Shift | None:
        if not before.count or not after.count:
            return None
        joined = Histogram.joined([before, after])  # the same buckets, or an error that says so
        parts = (np.cumsum(each.counts) / each.count for each in (before, after))
        first, second = parts
        distance = float(np.abs(first - second).max())
        size = before.count * after.count / joined.count
        score = distance / (math.sqrt(-math.log(level / 2) / 2) / math.sqrt(size))
        if score <= 1 or distance < self.length_floor:
            return None
        return Shift(what, before.mean, after.mean, distance, score)


def dispersion(windows: Sequence[Window]) -> float:
    """Variance over mean of the windows' counts, at least 1: how much more uneven arrivals are than a Poisson process.

    Fewer than eight windows say too little and count as 1.
    """
    if len(windows) < 8:
        return 1.0
    counts, seconds = (np.array([getattr(each, name) for each in windows]) for name in ("requests", "seconds"))
    expected = counts.sum() / seconds.sum() * seconds
    return max(1.0, float(((counts - expected) ** 2 / expected).sum() / (len(windows) - 1)))
