"""What a search is compared with: plans drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_suite.planner.search.assess import Task, assess
from vllm_suite.planner.search.candidates import Candidate
from vllm_suite.planner.search.space import Space
from vllm_suite.planner.search.trial import Evaluate


@dataclass(frozen=True)
class Baseline:
    """Plans drawn at random, and the goodput of each in requests per second; 0 for one that cannot meet the targets."""

    plans: tuple[str, ...]
    goodputs: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Requests per second."""
        return sum(self.goodputs) / len(self.goodputs)


def random_plans(
    space: Space, listed: Sequence[Candidate], evaluate: Evaluate, count: int = 10, seed: int = 0, step: float = 0.05
) -> Baseline:
    """Draw plans, each with the same chance, and find their goodputs: the baseline of EPD's table 5.

    Args:
        step: relative width that a goodput is found to.
    """
    draw = random.Random(seed)
    plans, goodputs = [], []
    for candidate in draw.sample(list(listed), min(count, len(listed))):
        plan = candidate.placed(space)
        plans.append(candidate.plan.name)
        if plan is None or candidate.bound.rate <= 0:
            goodputs.append(0.0)
            continue
        start = candidate.bound.estimate or 1.0
        goodputs.append(assess(Task(plan, start, ceiling=candidate.bound.rate, step=step), evaluate).goodput or 0.0)
    return Baseline(tuple(plans), tuple(goodputs))
