"""The `predicted:` section of a fleet file: what `vllm-suite plan` said that requests see."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from vllm_suite.fleet.engine import Settings
from vllm_suite.fleet.units import DurationMs

ORDER = (("p50", "p99"), ("p50_low", "p50"), ("p50", "p50_high"), ("p99_low", "p99"), ("p99", "p99_high"))
"""Of each pair the first is at most the second; the chart's templates check the same."""


class PredictedTimes(Settings):
    """Of the requests at the planned rate; the bounds with every step quicker and slower by the error bar.

    A bound is further off than the error bar itself where queues grow with the time of a step.
    """

    p50: DurationMs = Field(description="half of the requests stay under it, for example 180ms")
    p99: DurationMs = Field(description="of 100 requests 99 stay under it")
    p50_low: DurationMs | None = Field(default=None, description="`p50` with every step quicker by `predicted.error`")
    p50_high: DurationMs | None = Field(default=None, description="`p50` with every step slower by it")
    p99_low: DurationMs | None = Field(default=None, description="`p99` with every step quicker by it")
    p99_high: DurationMs | None = Field(default=None, description="`p99` with every step slower by it")

    @model_validator(mode="after")
    def _in_order(self) -> PredictedTimes:
        for less, more in ORDER:
            a, b = getattr(self, less), getattr(self, more)
            if a is not None and b is not None and a > b:
                raise ValueError(f"{less} {a:g}ms is above {more} {b:g}ms")
        return self


class PredictedSpec(Settings):
    """What a plan promised. Nothing is rejected for it; alerts and the live page hold it against what is measured."""

    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        description="requests per second of the whole fleet that the times are of"
    )
    ttft: PredictedTimes | None = Field(default=None, description="time to first token")
    tpot: PredictedTimes | None = Field(
        default=None, description="time per output token after the first, mean of a request"
    )
    error: Annotated[float, Field(ge=0, lt=1)] = Field(description="of step times, relative: 0.25 is 25 % either way")
    source: Annotated[str, Field(min_length=1)] = Field(description="where step times came from, for example roofline")
