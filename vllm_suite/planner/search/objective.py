"""What a plan is good for, as one number to maximise, and the best number that a plan could have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.plan import Plan
from vllm_suite.planner.search.bounds import PlanBound
from vllm_suite.planner.search.trial import Trial

Goal = Literal["goodput", "cost", "energy", "latency"]
GOALS: tuple[Goal, ...] = ("goodput", "cost", "energy", "latency")


@dataclass(frozen=True)
class Objective:
    """One of the goals on one cluster.

    `goodput` is the highest rate with enough requests within their targets, over the accelerators that there are. The
    others hold at one rate, for plans that meet the targets there: `cost` is the number of accelerators, and of plans
    with as many the mean latency; `energy` joules per generated token; `latency` mean seconds of a request.
    """

    goal: Goal
    cluster: Cluster
    rate: float | None = None
    tokens: float = 1.0

    @property
    def at_rate(self) -> bool:
        """Whether plans are compared at one rate, in place of their highest."""
        return self.goal != "goodput"

    def most(self, plan: Plan, bound: PlanBound) -> float:
        """The value of a plan at most; -inf where it cannot meet the targets."""
        if bound.rate <= 0:
            return -math.inf
        if self.goal == "goodput":
            return bound.rate / self.cluster.gpus
        assert self.rate is not None
        if bound.rate < self.rate:
            return -math.inf
        if self.goal == "latency":
            return -bound.latency
        if self.goal == "cost":
            return -(plan.gpus + _share(bound.latency))
        power = plan.gpus * self.cluster.device.power.idle_w
        return -power / (self.rate * self.tokens)

    def value(self, plan: Plan, goodput: float | None, trial: Trial | None) -> float:
        """The value of a plan that was simulated; -inf where it does not meet the targets."""
        if self.goal == "goodput":
            return -math.inf if not goodput else goodput / self.cluster.gpus
        if trial is None or not trial.met:
            return -math.inf
        if self.goal == "latency":
            return -trial.latency
        if self.goal == "cost":
            return -(plan.gpus + _share(trial.latency))
        return -trial.energy if trial.energy == trial.energy else -math.inf


def _share(latency: float) -> float:
    """Of 0 to below 1, ascending with the latency: what decides between plans with as many accelerators."""
    return latency / (1 + latency)


Point = TypeVar("Point")


def pareto(points: Iterable[Point], values: Callable[[Point], tuple[float, ...]]) -> list[Point]:
    """Those that no other one is at least as good as in every value and better in one; larger is better.

    A value that is nan is the worst. Of points with equal values the first is kept. In the order given.
    """
    listed = [(point, tuple(-math.inf if v != v else v for v in values(point))) for point in points]
    front = []
    for index, (point, own) in enumerate(listed):
        beaten = any(
            all(b >= a for a, b in zip(own, other, strict=True)) and (other != own or place < index)
            for place, (_, other) in enumerate(listed)
            if place != index
        )
        if not beaten:
            front.append(point)
    return front
