"""Seconds that one engine step takes, given what the step computes: the seam between simulators and machines.

Who calls it: whatever steps a virtual clock, once for each step, in order (the scheduler replay under `benchmarks/`,
later the planner's simulator). Who implements it: a cost model, a table of measurements, a calibration of this machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol


class Batch(NamedTuple):
    """What one engine step computes. Counts, all at least 0.

    Attributes:
        prefill_tokens: tokens of prompts, and of contexts that are computed again after a preemption.
        sequences: sequences with at least one token in the step, in prefill or in decode.
        kv_tokens: context length summed over these sequences, the step's own tokens included.
    """

    prefill_tokens: int
    sequences: int
    kv_tokens: int


class LatencySource(Protocol):
    """Maps a batch to the time of its step. Deterministic, and finite for every batch."""

    def step_seconds(self, batch: Batch) -> float:
        """Seconds of one step, above 0; the scheduler's own time between two steps is included."""
        ...


@dataclass(frozen=True)
class AffineSteps:
    """A step's time as a constant plus one cost for each sequence, context token and prefill token, in seconds.

    Arithmetic alone: a `Batch` of three arrays of one shape gives an array of that shape. Raises ValueError for a
    cost that is negative or not finite, and where `step` is not above 0.
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

    def step_seconds(self, batch: Batch) -> float:
        """See `LatencySource`."""
        return (
            self.step
            + self.per_sequence * batch.sequences
            + self.per_kv_token * batch.kv_tokens
            + self.per_prefill_token * batch.prefill_tokens
        )
