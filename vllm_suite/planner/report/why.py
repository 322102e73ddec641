"""Why there is no plan: which target fails, and how far off the best plan is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.outcome import Outcome
from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.search.candidates import Candidate
from vllm_suite.planner.search.case import Case, What
from vllm_suite.planner.search.space import Space
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.workload import Request


@dataclass(frozen=True)
class Impossible:
    """No plan meets the targets.

    Attributes:
        fails: the targets that no plan meets, of ``ttft``, ``tpot``, ``both`` (each alone can be met) and ``rate``
            (they can be met at a lower one).
        ttft, tpot: seconds that the wanted share of requests stays under at no load, in the plans best at each.
        nearest: the plan that misses by the smallest factor, and its figures at a low rate.
    """

    fails: tuple[str, ...]
    ttft: float
    tpot: float
    ttft_plan: Plan
    tpot_plan: Plan
    nearest: Plan
    rate: float
    outcome: Outcome | None

    def as_json(self) -> dict[str, Any]:
        """For files."""
        return {
            "fails": list(self.fails), "least_ttft": self.ttft, "least_ttft_plan": self.ttft_plan.name,
            "least_tpot": self.tpot, "least_tpot_plan": self.tpot_plan.name, "nearest": self.nearest.name,
            "rate": self.rate, "at_rate": None if self.outcome is None else self.outcome.as_json(),
        }  # fmt: skip


def impossible(case: Case, space: Space, listed: Sequence[Candidate], sample: list[Request]) -> Impossible:
    """Say it, for plans that were bounded and found to fail."""
    slo = case.slo

    def miss(candidate: Candidate) -> tuple[float, float]:
        """The larger of both factors by which it misses at no load; of equals the one with the higher estimate."""
        factors = [1.0]
        if slo.ttft is not None:
            factors.append(candidate.bound.ttft / slo.ttft)
        if slo.tpot is not None:
            factors.append(candidate.bound.tpot / slo.tpot)
        return max(factors), -candidate.bound.estimate

    placed = [each for each in sorted(listed, key=miss)[:8] if each.placed(space) is not None]
    quick = min(listed, key=lambda each: each.bound.ttft)
    dense = min(listed, key=lambda each: each.bound.tpot)
    fails = []
    if slo.ttft is not None and quick.bound.ttft > slo.ttft:
        fails.append("ttft")
    if slo.tpot is not None and dense.bound.tpot > slo.tpot:
        fails.append("tpot")
    if not fails and all(each.bound.rate <= 0 for each in listed):
        fails.append("both")
    nearest = (placed or list(listed))[0].placed(space) or listed[0].plan.placed()
    # One request after the other, as good as no load.
    rate = 0.05 / max(1e-6, listed[0].bound.latency)
    try:
        outcome: Outcome | None = case.outcome(What(nearest, rate), sample)
    except (PlanError, SimulationError):
        outcome = None
    return Impossible(
        tuple(fails) or ("rate",), quick.bound.ttft, dense.bound.tpot, quick.plan, dense.plan, nearest, rate, outcome
    )
