"""What the search asks of a simulator, and what it keeps of the answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from vllm_suite.planner.plan import Plan

Until = Literal["end", "decided", "failed"]
"""When a simulation may stop: with its last request, as soon as it is certain whether the share of requests that meet
their targets is reached, or as soon as it is certain that it is not."""


@dataclass(frozen=True)
class Trial:
    """One plan at one rate.

    Attributes:
        rate: requests per second.
        attainment: share of requests that met both targets; of those seen, where the simulation stopped early.
        low, high: its 95 % interval.
        met: whether the share that is asked for was reached.
        whole: the simulation ran to its end; the fields below are nan otherwise.
        latency: mean seconds of a request.
        ttft, tpot: seconds that the share of requests stays under.
        energy: joules per generated token; nan where it is not known.
        cost: money per million generated tokens; nan where no price is known.
        steady: nothing grew to the end, so that a longer trace would say the same.
    """

    rate: float
    attainment: float
    low: float
    high: float
    met: bool
    whole: bool = True
    latency: float = math.nan
    ttft: float = math.nan
    tpot: float = math.nan
    energy: float = math.nan
    cost: float = math.nan
    steady: bool = True

    def as_json(self) -> dict[str, Any]:
        """For files; nan becomes None."""
        return {key: None if value != value else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trial:
        """The inverse of `as_json`."""
        values: dict[str, Any] = {key: math.nan if value is None else value for key, value in data.items()}
        return cls(**values)


class Evaluate(Protocol):
    """A simulator of plans. Deterministic: equal arguments give equal trials, in any process."""

    def __call__(self, plan: Plan, rate: float, until: Until = "end") -> Trial:
        """Simulate the workload at so many requests per second.

        Raises:
            SimulationError, PlanError: the plan cannot serve the workload.
        """
        ...
