"""The `slo:` section of a fleet file."""

from __future__ import annotations

from pydantic import Field

from vllm_suite.fleet.engine import Settings
from vllm_suite.fleet.units import DurationMs


class SloSpec(Settings):
    """What a request should see. Recorded with the fleet; nothing is rejected for it."""

    ttft: DurationMs | None = Field(default=None, description="time to first token, for example 300ms")
    tpot: DurationMs | None = Field(default=None, description="time per output token after the first")
