"""Rules that ask for a switch: EPD's own, from the simulator, and one on predicted goodput."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from vllm_suite.planner.plan import Role
from vllm_suite.planner.simulator.switching import Policy, Stage, Switch, epd_rule

__all__ = ["Policy", "Stage", "Switch", "epd_rule", "goodput_rule"]

Predict = Callable[[Mapping[Role, int]], float]
"""Goodput in requests a second of so many engines by role, under the load there is."""


def goodput_rule(
    predict: Predict, cost: Callable[[Role, Role], float], horizon: float, least_gain: float = 0.05
) -> Policy:
    """The switch with the greatest predicted gain less its cost.

    Over `horizon` seconds a switch gives the difference of the two goodputs for what is left after `cost` seconds, and
    takes what the engine would have done in those. It has to be worth more than `least_gain` of what the fleet does
    without it.
    """

    def rule(stages: Sequence[Stage], now: float) -> Switch | None:
        counts = {stage.role: stage.engines for stage in stages}
        present = predict(counts)
        best, best_gain = None, least_gain * present * horizon
        for source in stages:
            if source.engines < 2:
                continue
            for target in stages:
                if target is source:
                    continue
                without = {**counts, source.role: source.engines - 1}
                after = {**without, target.role: target.engines + 1}
                seconds = min(cost(source.role, target.role), horizon)
                gain = (predict(after) - present) * (horizon - seconds) - (present - predict(without)) * seconds
                if gain > best_gain:
                    best, best_gain = Switch(source.role, target.role), gain
        return best

    return rule
