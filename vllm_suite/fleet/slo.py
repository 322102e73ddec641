"""The `slo:` section of a fleet file."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vllm_suite.fleet.engine import Settings
from vllm_suite.fleet.units import DurationMs


class SloSpec(Settings):
    """What a request should see. Recorded with the fleet; nothing is rejected for it."""

    ttft: DurationMs | None = Field(default=None, description="time to first token, for example 300ms")
    tpot: DurationMs | None = Field(default=None, description="time per output token after the first")
    attainment: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.9, description="share of requests that are to keep both; an alert fires where too few do"
    )
