"""Experts that are not met evenly: a step takes as long as the rank whose experts have most rows.

The expert part of a step is what a source's time grows by with its imbalance. How far the busiest rank is above the
mean changes from step to step with the tokens; here it is drawn, by the step's own sums, so that the same step takes
the same time whoever asks.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from vllm_suite.planner.sources.base import FloatArray, LatencySource, SourceError, as_arrays
from vllm_suite.planner.sources.steps import DecodeLine, Steps

_DRAWS = 1024


class Imbalanced(LatencySource):
    """A source whose experts' imbalance is log-normal over steps.

    Args:
        even: the source where all ranks have as many rows (`Efficiency.imbalance` 1).
        skewed: the same with an imbalance of `mean`.
        mean: rows of the busiest rank over the mean, on average over steps; above 1.
        deviation: its standard deviation over steps.
        seed: of the draws.
        every: decode steps for which one draw holds.

    Raises:
        SourceError: a mean that is not above 1, or a deviation below 0.
    """

    def __init__(
        self,
        even: LatencySource,
        skewed: LatencySource,
        *,
        mean: float,
        deviation: float,
        seed: int = 0,
        every: int = 16,
    ) -> None:
        if not mean > 1 or not deviation >= 0 or every < 1:
            raise SourceError(f"imbalance {mean:g} has to be above 1, its deviation {deviation:g} at least 0")
        self.even, self.skewed, self.every = even, skewed, every
        self.name, self.stages = f"{even.name}, imbalance {mean:g} ± {deviation:g}", even.stages
        self.uncertainty, self.outside = even.uncertainty, even.outside
        # The excess over 1 is log-normal; quantiles of it, scaled to the mean of `skewed`, are the draws.
        width = float(np.sqrt(np.log1p((deviation / (mean - 1)) ** 2)))
        normal = NormalDist()
        draws = np.exp([width * normal.inv_cdf((index + 0.5) / _DRAWS) for index in range(_DRAWS)])
        self.shares: FloatArray = draws / draws.mean()
        self._shares: list[float] = self.shares.tolist()
        self._seed = (seed * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF

    def share(self, tokens: int, context: int) -> float:
        """The excess of a step over that of the mean step."""
        return self._shares[self._index(tokens, context)]

    def _index(self, tokens: int, context: int) -> int:
        mixed = (tokens * 0x85EBCA6B ^ context * 0xC2B2AE35 ^ self._seed) & 0xFFFFFFFF
        mixed = (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
        return (mixed ^ (mixed >> 13)) % _DRAWS

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        share = self.share(int(steps.tokens), int(steps.kv_tokens))
        first = self.even.step_seconds(steps)
        return first + share * (self.skewed.step_seconds(steps) - first)

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        share = self.share(int(steps.tokens), int(steps.kv_tokens))
        first = self.even.stage_seconds(steps)
        return first + share * (self.skewed.stage_seconds(steps) - first)

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        tokens, context = rows.tokens, rows.kv_tokens
        index = [self._index(int(a), int(b)) for a, b in zip(tokens.ravel(), context.ravel(), strict=True)]
        first = self.even.seconds(rows)
        found: FloatArray = first + self.shares[index].reshape(tokens.shape) * (self.skewed.seconds(rows) - first)
        return found

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`; it holds for `every` steps."""
        share = self.share(sequences, int(context))
        even = self.even.decode_line(sequences, context, longest, shortest)
        skewed = self.skewed.decode_line(sequences, context, longest, shortest)
        return DecodeLine(
            even.seconds + share * (skewed.seconds - even.seconds),
            even.slope + share * (skewed.slope - even.slope),
            min(self.every, even.steps, skewed.steps),
        )

    def host_seconds(self, sequences: int) -> float:
        """See `LatencySource`."""
        return self.even.host_seconds(sequences)
