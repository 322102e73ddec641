"""Rules as the controller asks them: they see every look, and say what they foresee."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from vllm_suite.roles.rules import Policy, Stage, Switch, epd_rule, goodput_rule
from vllm_suite.roles.scale import SPARE
from vllm_suite.roles.seen import Seen
from vllm_suite.roles.traffic import Observer, Traffic

if TYPE_CHECKING:
    from vllm_suite.fleet.spec import FleetSpec
    from vllm_suite.planner.plan import Role
    from vllm_suite.roles.config import PredictSpec
    from vllm_suite.roles.predict import Predictor


class Rule(Policy, Protocol):
    """A policy that is shown the fleet at every look, those without a question among them."""

    def see(self, fleet: Sequence[Seen], now: float) -> None:
        """One look."""

    def spare(self) -> bool:
        """Whether one instance fewer would do, as the last question has shown; False where that is not known."""

    def figures(self) -> Mapping[str, float]:
        """For the controller's gauges `vllm_suite_roles_<name>`."""


class Follow:
    """A policy that looks at queues alone; EPD's where none is given."""

    def __init__(self, policy: Policy = epd_rule) -> None:
        self._policy = policy

    def __call__(self, stages: Sequence[Stage], now: float) -> Switch | None:
        return self._policy(stages, now)

    def see(self, fleet: Sequence[Seen], now: float) -> None:
        """Nothing of it is kept."""

    def spare(self) -> bool:
        """Queues do not tell."""
        return False

    def figures(self) -> Mapping[str, float]:
        """None."""
        return {}


class Foresee:
    """The switch with the greatest predicted gain in goodput, less its cost, under the traffic of the last window."""

    def __init__(self, predictor: Predictor, spec: PredictSpec) -> None:
        self._predictor = predictor
        self._spec = spec
        self._observer = Observer(spec.window)
        self._figures: dict[str, float] = {}
        self._spare = False

    def see(self, fleet: Sequence[Seen], now: float) -> None:
        """One look."""
        self._observer.see(fleet, now)

    def spare(self) -> bool:
        """One fewer, in the best roles, serves `SPARE` times what comes."""
        return self._spare

    def figures(self) -> Mapping[str, float]:
        """Demand and goodputs of the last question; NaN while too little is known."""
        return self._figures

    def __call__(self, stages: Sequence[Stage], now: float) -> Switch | None:
        traffic, self._spare = self._observer.traffic(), False
        if traffic is None:
            self._figures = dict.fromkeys(("demand", "goodput", "goodput_best"), math.nan)
            return None
        # The counts of engines say nothing of what there is to encode.
        return self._asked(traffic, [stage for stage in stages if stage.role != "encode"], now)

    def _asked(self, traffic: Traffic, stages: Sequence[Stage], now: float) -> Switch | None:
        engines = {stage.role: stage.engines for stage in stages}
        known: dict[tuple[int, ...], float] = {}

        def predict(counts: Mapping[Role, int]) -> float:
            key = tuple(counts[role] for role in engines)
            if key not in known:
                known[key] = self._predictor.goodput(traffic, counts)
            return known[key]

        def cost(source: Role, target: Role) -> float:
            return self._predictor.switch_seconds(traffic, source, engines[source])

        found = goodput_rule(predict, cost, self._spec.horizon, self._spec.least_gain)(stages, now)
        present = predict(engines)
        more = replace(traffic, rate=SPARE * traffic.rate)
        total = sum(engines.values())
        self._spare = set(engines) == {"prefill", "decode"} and any(
            self._predictor.goodput(more, {"prefill": prefill, "decode": total - 1 - prefill})
            >= more.demand(self._spec.window)
            for prefill in range(1, total - 1)
        )
        self._figures = {
            "demand": traffic.demand(self._spec.window),
            "goodput": present,
            # One engine fewer is part of what a switch costs, and no fleet that would be chosen.
            "goodput_best": max(value for key, value in known.items() if sum(key) == sum(engines.values())),
        }
        return found


def rule_of(fleet: FleetSpec) -> Rule:
    """What the fleet file's `roles.rule` names. Raises PredictError."""
    from vllm_suite.roles.predict import Predictor

    predict = fleet.roles.predict
    if fleet.roles.rule == "epd" or predict is None:
        return Follow()
    return Foresee(Predictor(fleet), predict)
