"""When requests arrive: as recorded, stretched to a rate, or drawn where nothing was recorded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_suite.fleet.traces import TraceError

_BATCH = 4096


def drawn(rate: float, cv: float, seed: int) -> Iterator[float]:
    """Endless arrivals in seconds, the first at one interval from 0.

    Intervals are gamma distributed with mean ``1 / rate`` and coefficient of variation `cv`: 1 is a Poisson process, 0
    a steady beat, above 1 bursts (the `burstiness` of `vllm bench serve` is ``1 / cv**2``).

    Raises:
        TraceError: a rate that is not above 0, or a negative cv.
    """
    if not 0 < rate < np.inf or not 0 <= cv < np.inf:
        raise TraceError(f"arrivals: rate {rate:g} has to be above 0, and cv {cv:g} at least 0")
    draw, now, shape = np.random.default_rng([seed, 1]), 0.0, 0.0 if cv == 0 else cv**-2
    while True:
        gaps = draw.gamma(shape, 1 / (rate * shape), _BATCH) if shape else np.full(_BATCH, 1 / rate)
        times = now + np.cumsum(gaps)
        now = float(times[-1])
        yield from times.tolist()
