"""How many requests a simulation takes, and which of them count, so that the answer does not depend on the number."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_suite.planner.plan import Slo

TURNS = 5
"""Residences that a simulation lasts at least: one to fill the fleet, three that count, one in which it empties."""


@dataclass(frozen=True)
class Horizon:
    """The length of simulations.

    Attributes:
        least: requests.
        residence: seconds that a request stays about, at the targets.
        most: requests, but for `least`.
    """

    least: int
    residence: float
    most: int = 100_000

    @classmethod
    def of(cls, slo: Slo, decoded: float, latency: float, least: int = 2000) -> Horizon:
        """For a pair of targets.

        Args:
            decoded: mean tokens of a request after the first.
            latency: mean seconds of a request at no load.
        """
        at_targets = (slo.ttft or 0.0) + (slo.tpot or 0.0) * decoded
        whole = slo.ttft is not None and slo.tpot is not None
        return cls(least, at_targets if whole else max(at_targets, 2 * latency))

    def count(self, rate: float) -> int:
        """Requests of a simulation at a rate."""
        return max(self.least, math.ceil(min(self.most, TURNS * rate * self.residence)))

    def counted(self, arrivals: Sequence[float]) -> range:
        """Which requests count, by their number: not those of the first and the last residence, a fifth at most."""
        last, size = arrivals[-1], len(arrivals)
        first = min(bisect_left(arrivals, self.residence), size // TURNS)
        end = max(bisect_right(arrivals, last - self.residence), size - size // TURNS)
        return range(first, max(end, first + 1))

    def after(self, seconds: float, request: float) -> float:
        """By how much more a fleet may have been asked for than it can serve for ever: a factor.

        What came before the end of the counted time may be served up to `seconds` after it.

        Args:
            request: seconds of the fleet that a request takes.
        """
        asked = max((TURNS - 1) * self.residence, (1 - 1 / TURNS) * self.least * request)
        return 1 + seconds / asked if asked > 0 else math.inf
