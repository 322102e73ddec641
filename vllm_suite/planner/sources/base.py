"""The seam between the planner and whatever knows how long an engine step takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vllm_suite.planner.sources.steps import DecodeLine, Steps

FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class SourceError(ValueError):
    """A source cannot be built, or is asked what it does not know and may not guess."""


@dataclass(frozen=True)
class Uncertainty:
    """How far a source's times may be off.

    Attributes:
        relative: half width of the interval that holds about two thirds of the steps, as a share of the time.
        origin: where that number comes from, for reports.
    """

    relative: float
    origin: str


@dataclass(frozen=True)
class Load:
    """What an engine has beside its steps, for sources that were measured with it.

    Attributes:
        serving: kind of fleet whose constants are added to steps; None for none.
        prompt_s: seconds of the engine's cores for each prompt chunk; None for those of `serving`.
        neighbours: share of the time for which the engines beside it are at work.
        slowdown: factor on all times, for other work on the engine's cores.
        counted: whether what is asked beyond the range counts for the source that this was made of.
    """

    serving: str | None = None
    prompt_s: float | None = None
    neighbours: float = 0.0
    slowdown: float = 1.0
    counted: bool = True


@dataclass
class Outside:
    """Queries beyond what a source knows, by the axis that left its range.

    Attributes:
        policy: refuse (`SourceError`), or answer as at the edge of the range and count.
        counts: steps by axis.
        furthest: the value furthest outside by axis.
    """

    policy: Literal["refuse", "clamp"] = "clamp"
    counts: dict[str, int] = field(default_factory=dict)
    furthest: dict[str, float] = field(default_factory=dict)

    def note(self, axis: str, value: float, low: float, high: float, count: int = 1) -> None:
        """Record steps whose `axis` lies outside `low` … `high`. Raises SourceError where that is the policy."""
        if self.policy == "refuse":
            raise SourceError(f"{axis} {value:g} is outside {low:g} to {high:g}, which is all that this source knows")
        self.counts[axis] = self.counts.get(axis, 0) + count
        known = self.furthest.get(axis, value)
        self.furthest[axis] = min(known, value) if value < low else max(known, value)

    def clamp(self, axis: str, value: float, low: float, high: float) -> float:
        """The value, moved into the range."""
        if low <= value <= high:
            return value
        self.note(axis, value, low, high)
        return low if value < low else high

    def clamp_all(self, axis: str, values: FloatArray, low: float, high: float) -> FloatArray:
        """The values, moved into the range."""
        beyond = (values < low) | (values > high)
        if beyond.any():
            found = values[beyond]
            worst = float(found.max() if found.max() > high else found.min())
            self.note(axis, worst, low, high, int(beyond.sum()))
        return np.clip(values, low, high)

    def report(self) -> Mapping[str, Any]:
        """For a result's JSON."""
        return {axis: {"steps": count, "furthest": self.furthest[axis]} for axis, count in sorted(self.counts.items())}


class LatencySource(ABC):
    """Seconds of engine steps of one model on one plan. Deterministic.

    The simulator asks `step_seconds` where every step differs and `decode_line` where a batch only decodes for a while;
    analyses ask `seconds` for arrays. All three agree: a step's time is the same whoever asks.

    Attributes:
        name: for reports.
        stages: pipeline stages.
        uncertainty: how far its times may be off.
        outside: what was asked beyond its range.
    """

    name: str
    stages: int = 1
    uncertainty: Uncertainty
    outside: Outside

    @abstractmethod
    def step_seconds(self, steps: Steps) -> float:
        """Seconds of one step from its start to its result, through all pipeline stages; 0 for an empty one."""

    @abstractmethod
    def seconds(self, steps: Steps) -> FloatArray:
        """The same for arrays of one shape."""

    @abstractmethod
    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """Decode steps of the same sequences from the next one on.

        Args:
            sequences: at least 1.
            context: keys attended to in the first of these steps, summed, as `Steps.decode_context`.
            longest, shortest: as in `Steps`.
        """

    def stage_seconds(self, steps: Steps) -> float:
        """Seconds for which the step holds the slowest pipeline stage: how soon another batch may follow."""
        return self.step_seconds(steps) / self.stages

    def host_seconds(self, sequences: int) -> float:
        """Of a step of so many sequences the seconds in which the device waits for the host: a step that is scheduled
        ahead hides them behind the step before it. Part of `step_seconds`; 0 where they are hidden already, or unknown.
        """
        return 0.0

    def loaded(self, load: Load) -> LatencySource:
        """The same engine among others, serving requests. Most sources know nothing of that and stay as they are."""
        return self

    def describe(self) -> dict[str, Any]:
        """For a result's JSON: what answered, how sure, and what was asked beyond its range."""
        return {
            "source": self.name,
            "uncertainty": self.uncertainty.relative,
            "uncertainty_origin": self.uncertainty.origin,
            "outside": dict(self.outside.report()),
        }


def as_arrays(steps: Steps) -> Steps:
    """All fields as float arrays of one shape."""
    return Steps(*np.broadcast_arrays(*(np.asarray(each, dtype=float) for each in steps)))
