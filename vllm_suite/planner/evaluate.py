"""One plan at one rate, and the highest rate at which it meets its targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.energy import Meter
from vllm_suite.planner.outcome import Collector, Outcome
from vllm_suite.planner.plan import Plan, Slo
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.traces.workload import Workload
from vllm_suite.planner.workload import Request

_STEPS = (0.02, 0.05, 0.1, 0.2, 0.4)
_Z = 1.96
# Requests per second: one after the other, and more than any fleet takes.
_SLOWEST, _FASTEST = 1e-3, 1e7
_ALONE = 400

Factory = Callable[[], Iterable[Request]]
"""Requests in order of arrival, the same at every call."""


def evaluate(
    plan: Plan,
    setting: Setting,
    requests: Factory,
    slo: Slo,
    *,
    rate: float | None = None,
    warm_up: float | None = None,
    stationary: bool = True,
    energy: bool = False,
) -> Outcome:
    """Simulate a plan.

    Args:
        rate: that the requests come at, for the result; None for that of the arrivals counted.
        warm_up, stationary: see `Collector`.
        energy: also joules per token; costs about a tenth more time.

    Raises:
        SimulationError, PlanError: the plan cannot serve the requests. ValueError: there are none.
    """
    setting = setting.settled(plan, requests)
    collector = Collector(slo, warm_up, stationary=stationary)
    meter = Meter(plan, setting) if energy else None
    run = simulate_plan(plan, setting, requests(), collector, observer=meter)
    return collector.outcome(plan, run, setting, rate, None if meter is None else meter.joules(run))


@dataclass(frozen=True)
class Point:
    """Attainment at a rate, with its 95 % interval; `growing` where the fleet did not keep up."""

    rate: float
    attainment: float
    low: float
    high: float
    growing: bool


@dataclass(frozen=True)
class Goodput:
    """The highest rate at which the share of requests that is asked for meets both targets.

    Attributes:
        rate: requests per second; 0 where no rate is low enough.
        low, high: its 95 % interval: where the ends of the attainment's interval reach the share, at most 40 % away,
            and for drawn lengths no narrower than the error of their mean.
        per_gpu: `rate` over the plan's accelerators.
        outcome: at `rate`, or at the lowest rate that was tried.
        points: every rate that was tried, ascending.
        limit: the target that fails beyond: ``ttft``, ``tpot``, ``both``, or ``throughput`` where it is the fleet that
            does not keep up.
    """

    rate: float
    low: float
    high: float
    per_gpu: float
    outcome: Outcome
    points: tuple[Point, ...]
    limit: str

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "rate": self.rate, "low": self.low, "high": self.high, "per_gpu": self.per_gpu, "limit": self.limit,
            "outcome": self.outcome.as_json(), "points": [vars(point) for point in self.points],
        }  # fmt: skip


def goodput(
    plan: Plan,
    setting: Setting,
    workload: Workload,
    slo: Slo,
    *,
    requests: int = 2400,
    most: int | None = None,
    tolerance: float = 0.02,
    start: float | None = None,
    seed: int = 0,
) -> Goodput:
    """Bisection on the rate; every rate sees the same requests, closer together or further apart.

    Where the traffic has no end and a run is too short to settle, it is made four times as long, up to `most`.

    Args:
        requests: of a run; at most those of a recorded trace.
        most: requests of a lengthened run; 16 times `requests` by default.
        tolerance: between the highest rate that passed and the lowest that did not, relatively.
        start: a rate to begin with; None to begin at that of one request after the other.

    Raises:
        SimulationError, PlanError: the plan cannot serve the requests.
    """
    search = _Search(plan, setting, workload, slo, requests, most or 16 * requests, seed)
    first = search.at(_SLOWEST)
    if not search.passes(first):
        return search.result(0.0, first)
    rate = start or min(1.0, 1 / first.latency.mean) * plan.gpus
    low, high = _SLOWEST, math.inf
    while not high / low <= 1 + tolerance:
        if search.passes(search.at(rate)):
            low = rate
        else:
            high = rate
        if math.isinf(high):
            rate = low * 2
            if rate > _FASTEST:
                break
        else:
            rate = high / 2 if low == _SLOWEST and high > 4 * _SLOWEST else math.sqrt(low * high)
    return search.result(low, search.at(low))


class _Search:
    def __init__(
        self, plan: Plan, setting: Setting, workload: Workload, slo: Slo, requests: int, most: int, seed: int
    ) -> None:
        self.plan, self.setting, self.workload, self.slo = plan, setting, workload, slo
        self.requests, self.most, self.seed = requests, most, seed
        self.known: dict[float, Outcome] = {}

    def at(self, rate: float) -> Outcome:
        if rate not in self.known:
            # Alone each request takes its own time, so that a few hundred say enough.
            count = self.requests if rate > _SLOWEST else min(self.requests, _ALONE)
            while True:
                found = self._run(rate, count)
                endless = self.workload.count is None
                if found.trend != "short" or not endless or count * 4 > self.most:
                    break
                count *= 4
            self.known[rate] = found
        return self.known[rate]

    def _run(self, rate: float, count: int) -> Outcome:
        workload = self.workload
        return evaluate(
            self.plan,
            self.setting,
            lambda: workload.requests(rate=rate, limit=count, seed=self.seed),
            self.slo,
            rate=rate,
            stationary=not workload.recorded,
        )

    def passes(self, outcome: Outcome) -> bool:
        return outcome.attainment >= self.slo.attainment and outcome.trend != "growing"

    def result(self, rate: float, outcome: Outcome) -> Goodput:
        low, high = (0.0, 0.0) if rate == 0 else self._interval(rate)
        points = tuple(
            Point(each, found.attainment, found.low, found.high, found.trend == "growing")
            for each, found in sorted(self.known.items())
        )
        beyond = next((self.known[each] for each in sorted(self.known) if each > rate), outcome)
        share = self.slo.attainment
        failing = [name for name, met in (("ttft", beyond.ttft_met), ("tpot", beyond.tpot_met)) if met < share]
        limit = failing[0] if len(failing) == 1 else "both"
        if beyond.trend == "growing":
            limit = "throughput"
        return Goodput(rate, low, high, rate / self.plan.gpus, outcome, points, limit)

    def _interval(self, rate: float) -> tuple[float, float]:
        """Rates at which the ends of the attainment's interval reach the share, tried outwards from `rate`."""
        low, high = (self._end(rate, sign, value) for sign, value in ((-1, _low), (1, _high)))
        drawn = 0.0 if self.workload.recorded else _Z * self.at(rate).load_error
        return min(low, rate * (1 - drawn)), max(high, rate * (1 + drawn))

    def _end(self, rate: float, sign: int, value: Callable[[Outcome], float]) -> float:
        share, before, known = self.slo.attainment, rate, self._height(rate, value)
        if (known >= share) == (sign < 0):
            return rate
        for step in _STEPS:
            reach = rate * (1 + sign * step)
            height = self._height(reach, value)
            if (height >= share) == (sign < 0):
                return before + (reach - before) * (known - share) / (known - height)
            before, known = reach, height
        return before

    def _height(self, rate: float, value: Callable[[Outcome], float]) -> float:
        found = self.at(rate)
        return 0.0 if found.trend == "growing" else value(found)


def _low(outcome: Outcome) -> float:
    return outcome.low


def _high(outcome: Outcome) -> float:
    return outcome.high
