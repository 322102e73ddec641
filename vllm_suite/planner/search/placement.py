"""The disaggregated plan by DistServe's algorithms: instances chosen apart, or as pairs that share nodes.

The estimates of goodput are simulations of one instance with nothing slow beside it: for prefill a decode instance, for
decode a prefill instance whose steps take no time; for a pair both. A decode instance has to meet the TTFT too, which
its queue counts into: requests that run meet a TPOT however many wait. Arrivals are the case's own, recorded or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from vllm_suite.planner.distserve.placement import Placed, Site, high_affinity, low_affinity
from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Role, Slo
from vllm_suite.planner.search.assess import Task, assess
from vllm_suite.planner.search.candidates import Candidate
from vllm_suite.planner.search.case import Case
from vllm_suite.planner.search.place import domain
from vllm_suite.planner.search.simulated import Simulated
from vllm_suite.planner.search.sources import Sources
from vllm_suite.planner.search.space import Space
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.workload import Request

_INSTANT = 1e-6
"""Factor of the times of an instance that is not to be seen."""


def placed_by(algorithm: str, case: Case, space: Space, sample: list[Request]) -> Candidate:
    """What an algorithm chooses for the rate that is asked for; without one, for the highest that fits.

    Args:
        algorithm: ``high`` or ``low``: how fast links between nodes are.

    Raises:
        PlanError: no instance reaches any goodput, or the cluster is too small for the rate.
    """
    if case.slo.ttft is None or case.slo.tpot is None:
        raise PlanError("placement: DistServe's algorithms need both targets, --ttft and --tpot")
    cluster, bounds = case.cluster, case.bounds(sample)
    nodes = -(-cluster.gpus // domain(cluster))
    # Instances over more than four nodes are nobody's choice, and there are very many of them.
    site = Site(domain(cluster), min(4, nodes))
    engines = {(pool.role, pool.parallel): pool for role in _ROLES for pool in reversed(space.engines(role))}
    single = _Single(case, sample)

    def fits(cut: Parallel) -> bool:
        return cut.gpus < cluster.gpus and all((role, cut) in engines for role in _ROLES)

    @cache
    def pair(prefill: Parallel, decode: Parallel) -> float:
        return single.goodput((engines["prefill", prefill], engines["decode", decode]), case.slo)

    @cache
    def alone(role: Role, cut: Parallel) -> float:
        # The other one is cut alike, so that both stand on the cluster.
        shape = (engines["prefill", cut], engines["decode", cut])
        slo = replace(case.slo, tpot=None) if role == "prefill" else case.slo
        if 2 * cut.gpus > cluster.gpus:
            return 0.0
        return single.goodput(shape, slo, "decode" if role == "prefill" else "prefill")

    def chosen(rate: float) -> Placed:
        if algorithm == "high":
            return high_affinity(site, rate, fits, lambda cut: alone("prefill", cut), lambda cut: alone("decode", cut))
        return low_affinity(site, rate, fits, pair)

    found = chosen(case.rate) if case.asked and case.rate else _largest(chosen, cluster.gpus)
    if _reach(found) > cluster.gpus:
        raise PlanError(f"placement {algorithm}: {found.plan.name} needs {_reach(found)} accelerators where it stands,"
                        f" there are {cluster.gpus}; lower --rate or leave --placement")  # fmt: skip
    pools = tuple(
        replace(engines[pool.role, pool.parallel], count=pool.count, ranks=pool.ranks) for pool in found.plan.pools
    )
    bare = Plan(tuple(replace(pool, ranks=()) for pool in pools))
    return Candidate(Plan(pools), "prefill+decode", 0, bounds.plan(bare), fixed=True)


_ROLES: tuple[Role, Role] = ("prefill", "decode")


def _largest(chosen: Callable[[float], Placed], gpus: int) -> Placed:
    """What is chosen for the highest rate at which it fits, to 1 %."""
    best = chosen(1e-3)
    if _reach(best) > gpus:
        return best
    low, high = 1e-3, 1e-3
    while _reach(chosen(high)) <= gpus:
        high *= 4
    while high > low * 1.01:
        rate = (low * high) ** 0.5
        found = chosen(rate)
        low, high, best = (rate, high, found) if _reach(found) <= gpus else (low, rate, best)
    return best


def _reach(found: Placed) -> int:
    """The last accelerator that is used, and so how many there have to be."""
    return 1 + max(rank for role in found.ranks.values() for one in role for rank in one)


class _Single:
    """One prefill and one decode instance, of which one may take no time."""

    def __init__(self, case: Case, sample: list[Request]) -> None:
        self.case, self.sample = case, sample
        self.instant: Sources = case.sources.scaled(_INSTANT)

    def goodput(self, shape: tuple[PoolPlan, PoolPlan], slo: Slo, instant: Role | None = None) -> float:
        """Requests per second."""
        case = self.case

        def source(pool: PoolPlan) -> LatencySource:
            return (self.instant if pool.role == instant else case.sources)(pool)

        setting = replace(case.setting, source=source)
        evaluate = Simulated(setting, case.workload, slo, case.horizon(self.sample), case.seed)
        return assess(Task(Plan(shape).placed()), evaluate).goodput or 0.0
