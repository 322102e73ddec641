"""How busy each pool was over a run, in a fixed number of bins: an observer whose memory does not grow."""

from __future__ import annotations

from typing import Any

import numpy as np

from vllm_suite.planner.observing import PoolOf
from vllm_suite.planner.plan import Plan
from vllm_suite.planner.simulator.encoders import Encoder
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.sources.steps import DecodeLine, Steps

Floats = np.ndarray[Any, np.dtype[np.float64]]

BINS = 256
KINDS = ("prompts", "decode", "sequences")
"""Seconds in steps with prompts, seconds in steps without, and sequence-seconds; summed over a pool's engines."""


class PoolSeries:
    """Sums over bins of equal length, which doubles as the run goes on.

    Attributes:
        width: seconds of a bin.
        sums: [pool, kind of `KINDS`, bin].
        end: of the last step.
    """

    def __init__(self, plan: Plan, width: float = 0.01) -> None:
        self.plan, self.width, self.end = plan, width, 0.0
        self.sums = np.zeros((len(plan.pools), len(KINDS), BINS))
        self._pool, self._place = PoolOf(plan), {pool.role: index for index, pool in enumerate(plan.pools)}

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        """See `engine.Observer`."""
        kind, sequences = 0 if steps.prefill_tokens else 1, float(steps.sequences)
        self._note(self._place[self._pool(engine).role], kind, start, end, sequences)

    def encoded(self, encoder: Encoder, start: float, end: float, items: int) -> None:
        """See `EncodeObserver`; batches count as prompts, and items as sequences."""
        self._note(self._place["encode"], 0, start, end, float(items))

    def _note(self, pool: int, kind: int, start: float, end: float, sequences: float) -> None:
        self.end = max(self.end, end)
        while self.end >= self.width * BINS:
            half = self.sums.reshape(*self.sums.shape[:2], BINS // 2, 2).sum(axis=3)
            self.sums[:, :, : BINS // 2], self.sums[:, :, BINS // 2 :], self.width = half, 0, 2 * self.width
        own = self.sums[pool]
        first, last = int(start / self.width), int(end / self.width)
        for place in range(first, last + 1):
            seconds = min(end, (place + 1) * self.width) - max(start, place * self.width)
            own[kind, place] += seconds
            own[2, place] += seconds * sequences

    def of(self, role: str) -> tuple[Floats, Floats]:
        """Of a pool: middles of the bins in seconds, and [kind, bin] per engine: shares of the time, and sequences."""
        size = min(BINS, int(self.end / self.width) + 1)
        index = next(place for place, pool in enumerate(self.plan.pools) if pool.role == role)
        count = self.plan.pools[index].count
        middles = (np.arange(size) + 0.5) * self.width
        each: Floats = self.sums[index, :, :size] / (self.width * count)
        return np.asarray(middles, dtype=float), each
