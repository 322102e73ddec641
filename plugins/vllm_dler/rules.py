"""How much a request's size moves it: the two orders that can be chosen.

Both give seconds to add to the arrival, never rising once given to a request, and both are 0 where nothing is known.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Protocol

from vllm_dler.config import BoostSettings
from vllm_dler.waits import quantile

# Arrivals, and requests that ended, that the boost's scales look back on; they are taken anew every so many.
_WINDOW, _EVERY = 256, 16
# Of latencies, the scale of the boost.
_SHARE = 0.95
# Sizes in units of the mean at which the boost falls by a factor of e, and the most of it in units of its scale.
_STEEPNESS, _MOST = 0.5, 2.0


class Rule(Protocol):
    """An order. ``lowest`` is the least that `offset` can be, in seconds."""

    lowest: float

    def offset(self, size: float) -> float:
        """Seconds to add to the arrival of a request of so many tokens; 0 for size 0, which is not known."""

    def arrived(self, size: float) -> None:
        """A request of that size came."""

    def finished(self, seconds: float) -> None:
        """A request ended so long after it came, and was not aborted."""


class KappaRule:
    """``kappa`` seconds for each token: the earliest deadline first, with slack in proportion to size."""

    lowest = 0.0

    def __init__(self, kappa: float) -> None:
        self.kappa = kappa

    def offset(self, size: float) -> float:
        return self.kappa * size

    def arrived(self, size: float) -> None: ...

    def finished(self, seconds: float) -> None: ...


class BoostRule:
    """Requests smaller than most go forward; the others all but keep the order of arrival.

    ``boost = strength * T * min(2, -ln(1 - exp(-S / (2 * mean S))))``, ``max_boost_s`` at most, in the shape of
    gamma-boost (arXiv 2404.08826). ``T`` is the 95th percentile of latency of what ended last, so the scale is the
    load's own: with nobody waiting it is small. 0 until enough requests have come and ended to tell.
    """

    def __init__(self, settings: BoostSettings) -> None:
        self._settings = settings
        self.lowest = -settings.max_boost_s
        self.scale = 0.0
        """Seconds: ``strength * T``."""
        self._mean = 0.0
        self._sizes: deque[float] = deque(maxlen=_WINDOW)
        self._latencies: deque[float] = deque(maxlen=_WINDOW)
        self._came = self._ended = 0

    def offset(self, size: float) -> float:
        if size <= 0 or not self._mean or not self.scale:
            return 0.0
        shape = -math.log(-math.expm1(-_STEEPNESS * size / self._mean))
        return -min(self.scale * min(shape, _MOST), self._settings.max_boost_s)

    def arrived(self, size: float) -> None:
        if size > 0:
            self._sizes.append(size)
            self._came += 1
            if self._came % _EVERY == 0:
                self._mean = sum(self._sizes) / len(self._sizes)

    def finished(self, seconds: float) -> None:
        self._latencies.append(seconds)
        self._ended += 1
        if self._ended % _EVERY == 0:
            self.scale = self._settings.strength * quantile(self._latencies, _SHARE)
