"""What the router holds its requests' times against: the fleet file's targets, and what its plan promised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_suite.fleet.predicted import PredictedSpec
from vllm_suite.fleet.slo import SloSpec
from vllm_suite.router.config import RouterConfig


@dataclass(frozen=True)
class Targets:
    """Both may say nothing."""

    slo: SloSpec = field(default_factory=SloSpec)
    predicted: PredictedSpec | None = None

    @classmethod
    def of(cls, config: RouterConfig) -> Targets:
        """Those of a router's settings."""
        return cls(config.slo, config.predicted)

    def bounds_s(self, time: str) -> list[float]:
        """Seconds of `ttft` or `tpot` at which a bucket of the histogram ends, so that shares are exact there."""
        target = getattr(self.slo, time)
        found = [] if target is None else [target / 1000]
        return found + [seconds for _, _, seconds in self.predicted_s(time)]

    def predicted_s(self, time: str) -> Iterator[tuple[str, str, float]]:
        """Share (0.5, 0.99), bound (low, middle, high) and seconds of what was predicted of `ttft` or `tpot`.

        As a label it is `share`: promtool keeps `quantile` for summaries.
        """
        times = None if self.predicted is None else getattr(self.predicted, time)
        if times is None:
            return
        for name, quantile in (("p50", "0.5"), ("p99", "0.99")):
            for end, bound in (("_low", "low"), ("", "middle"), ("_high", "high")):
                value = getattr(times, name + end)
                if value is not None:
                    yield quantile, bound, value / 1000
