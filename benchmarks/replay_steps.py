"""What a step of the replayed engine costs: four constants, for policies to be ranked on equal terms."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Protocol

from vllm_suite.planner.sources.steps import Steps


class StepTimes(Protocol):
    """Maps a step to its time. Deterministic, and finite for every step; the planner's sources are such."""

    def step_seconds(self, steps: Steps) -> float:
        """Seconds of one step, above 0; the scheduler's own time between two steps is included."""
        ...


@dataclass(frozen=True)
class AffineSteps:
    """A step's time as a constant plus one cost for each sequence, context token and prefill token, in seconds.

    Arithmetic alone: `Steps` of arrays of one shape give an array of that shape. Raises ValueError for a cost that is
    negative or not finite, and where `step` is not above 0.
    """

    step: float
    per_sequence: float
    per_kv_token: float
    per_prefill_token: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not math.isfinite(value) or value < 0 or (field.name == "step" and value == 0):
                raise ValueError(f"AffineSteps: {field.name} is a time in seconds, not {value!r}")

    def step_seconds(self, steps: Steps) -> Any:
        """See `StepTimes`."""
        return (
            self.step
            + self.per_sequence * steps.sequences
            + self.per_kv_token * steps.kv_tokens
            + self.per_prefill_token * steps.prefill_tokens
        )
