"""When requests arrive: as recorded, stretched to a rate, or drawn where nothing was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from vllm_suite.fleet.traces import TraceError

SCALED = 1_000_000
"""Arrivals that are drawn at once, 8 bytes each."""

_BATCH = 4096


def drawn(rate: float, cv: float, seed: int, count: int | None = None) -> Iterator[float]:
    """Arrivals in seconds, the first at 0.

    Intervals are gamma distributed with mean ``1 / rate`` and coefficient of variation `cv`: 1 is a Poisson process, 0
    a steady beat, above 1 bursts (the `burstiness` of `vllm bench serve` is ``1 / cv**2``). Of up to `SCALED` of them
    the mean is exact, as in `vllm bench serve`: a short draw would otherwise have another rate than was asked for.

    Args:
        count: how many; None for endless ones.

    Raises:
        TraceError: a rate that is not above 0, or a negative cv.
    """
    if not 0 < rate < np.inf or not 0 <= cv < np.inf:
        raise TraceError(f"arrivals: rate {rate:g} has to be above 0, and cv {cv:g} at least 0")
    draw = np.random.default_rng([seed, 1])
    if count is not None and count <= SCALED:
        times = np.concatenate([[0.0], np.cumsum(_gaps(draw, rate, cv, max(0, count - 1)))])
        if count > 1:
            times *= (count - 1) / rate / times[-1]
        return iter(times.tolist())
    return islice(_endless(draw, rate, cv), count)


def _endless(draw: np.random.Generator, rate: float, cv: float) -> Iterator[float]:
    now = 0.0
    yield now
    while True:
        times = now + np.cumsum(_gaps(draw, rate, cv, _BATCH))
        now = float(times[-1])
        yield from times.tolist()


def _gaps(draw: np.random.Generator, rate: float, cv: float, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.full(count, 1 / rate) if cv == 0 else draw.gamma(cv**-2, cv**2 / rate, count)
