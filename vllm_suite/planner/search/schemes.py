"""APEX's schemes as candidates: those of its plans that vLLM can start, with the settings of the space."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

from vllm_suite.planner.apex.space import Block, schemes
from vllm_suite.planner.models import ModelError
from vllm_suite.planner.models.sharding import check
from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.search.bounds import Bounds
from vllm_suite.planner.search.candidates import Candidate, ordered
from vllm_suite.planner.search.space import Space


def scheme_candidates(space: Space, bounds: Bounds) -> tuple[list[Candidate], str]:
    """Colocated plans of APEX's space in the order in which they are tried, and how many of its schemes they are.

    Raises:
        PlanError: APEX cannot describe the model, or none of its schemes is one that vLLM can start and that fits.
    """
    quant = bounds.setting.quant
    try:
        block = Block.of(space.model, quant)
    except ModelError as error:
        raise PlanError(f"schemes=apex: {error}") from error
    every = list(schemes(block, space.cluster))
    started = [plan for scheme in every if (plan := scheme.plan(block)) is not None and _runs(plan, space)]
    found: list[Candidate] = []
    fitting = 0
    for plan in started:
        bare = plan.pools[0]
        pools = [
            replace(bare, quant=own, max_num_seqs=each.seqs, max_num_batched_tokens=each.tokens)
            for own, each in product(space.choices.quants, space.choices.any)
        ]
        pools = [pool for pool in pools if space.fits(replace(pool, count=1), True)]
        fitting += bool(pools)
        found += [Candidate(Plan((pool,)), "any", 0, bounds.plan(Plan((pool,)))) for pool in pools]
    said = f"{len(every)} schemes of APEX, {len(started)} of which vLLM can start; {fitting} hold the longest request"
    if not found:
        raise PlanError(f"schemes=apex: {said}")
    return ordered(found), said


def _runs(plan: Plan, space: Space) -> bool:
    try:
        check(space.model, plan.pools[0].parallel)
    except ModelError:
        return False
    return True
