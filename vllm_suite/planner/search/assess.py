"""One plan: its highest rate within the targets, by bisection, given up as soon as it cannot beat another plan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.search.trial import Evaluate, Trial
from vllm_suite.planner.simulator.jobs import SimulationError

MOST_TRIALS = 40
MOST_RATE = 1e9
"""Requests per second. A plan that holds them misses no target however much it is asked for."""

_NEAR, _FAR = 1.04, 1.15
"""First steps of a bisection: from a rate that another plan holds, and from a guess."""


@dataclass(frozen=True)
class Assessed:
    """What was found of a plan.

    Attributes:
        goodput: the highest rate that met the targets; 0 for none, None where it was not looked for.
        below: a rate that it did not meet, above `goodput`; inf where there was none.
        trials: in the order they were made.
        error: why the plan cannot be run; None where it can.
    """

    goodput: float | None = None
    below: float = math.inf
    trials: tuple[Trial, ...] = ()
    error: str | None = None

    def at(self, rate: float) -> Trial | None:
        """The whole trial at a rate."""
        return next((trial for trial in self.trials if trial.rate == rate and trial.whole), None)

    def as_json(self) -> dict[str, Any]:
        """For files."""
        below = None if math.isinf(self.below) else self.below
        return {"goodput": self.goodput, "below": below, "error": self.error,
                "trials": [trial.as_json() for trial in self.trials]}  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Assessed:
        """The inverse of `as_json`."""
        below = math.inf if data["below"] is None else data["below"]
        trials = tuple(Trial.from_json(each) for each in data["trials"])
        return cls(data["goodput"], below, trials, data["error"])


@dataclass(frozen=True)
class Task:
    """What is to be found of a plan.

    Attributes:
        start: a guess of its goodput.
        floor: a rate that another plan holds: one that does not hold `floor` x (1 + `step`) is given up.
        ceiling: a rate that it cannot hold more than.
        step: relative width of the interval that the bisection ends with.
        rate: simulate at this rate alone, and look for no goodput.
    """

    plan: Plan
    start: float = 1.0
    floor: float = 0.0
    ceiling: float = math.inf
    step: float = 0.02
    rate: float | None = None


def assess(task: Task, evaluate: Evaluate) -> Assessed:
    """Do it. A plan that cannot be run is an answer."""
    try:
        if task.rate is not None:
            return Assessed(trials=(evaluate(task.plan, task.rate, "failed"),))
        return _goodput(task, evaluate)
    except (PlanError, SimulationError) as error:
        return Assessed(0.0 if task.rate is None else None, 0.0, error=str(error))


def _goodput(task: Task, evaluate: Evaluate) -> Assessed:
    trials: list[Trial] = []

    def holds(rate: float) -> bool:
        trials.append(evaluate(task.plan, rate, "decided"))
        return trials[-1].met

    low, high = 0.0, task.ceiling
    if task.floor > 0:
        if task.floor * (1 + task.step) >= high:
            return Assessed(0.0, high, ())
        low = task.floor * (1 + task.step)
        if not holds(low):
            return Assessed(0.0, low, tuple(trials))
    # Whoever beats another plan does so by little, and far beyond what a fleet holds its runs are longest.
    stride, found = (_NEAR, False) if low else (_FAR, False)
    rate = low * stride if low else min(task.start, high)
    if low and rate >= high:
        rate = (low + high) / 2
    # From the guess by growing steps to a rate that holds and one that does not, then halves.
    while len(trials) < MOST_TRIALS and not (low and high < low * (1 + task.step)):
        if rate > MOST_RATE:
            break
        if holds(rate):
            low, found = rate, True
        else:
            high = rate
        if not low and high < 1e-3 * task.start:
            break
        if low and math.isfinite(high) and (high < task.ceiling or (found and rate * stride >= high)):
            rate = math.sqrt(low * high)
        elif low:
            rate, stride = min(rate * stride, high), stride * stride
        else:
            rate, stride = rate / stride, stride * stride
    return Assessed(low, high, tuple(trials))
