"""The two placement algorithms of the DistServe paper (section 4.1 and 4.2), with any estimate of goodput.

High node affinity: the network between nodes is fast, so prefill and decode are chosen and placed apart. Low node
affinity: keys and values may go over links inside a node only, so an instance of each is chosen as a pair whose
pipelines are cut alike, and the same segment of both stands in one node. DistServe's code searches pairs in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import ceil, isfinite
from typing import TypeVar

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Role

Choice = TypeVar("Choice")

Fits = Callable[[Parallel], bool]
"""Whether the model, cut like this, can be run and leaves room for cache on every accelerator."""
Goodput = Callable[[Parallel], float]
"""Requests per second that one instance serves within its target; 0 for none."""
PairGoodput = Callable[[Parallel, Parallel], float]
"""The same of a prefill and a decode instance together, with both targets."""


@dataclass(frozen=True)
class Site:
    """Where instances stand.

    Attributes:
        gpus_per_node: accelerators that share fast links (M in the paper).
        nodes_per_instance: that one instance may span (N).
        nodes: that there are; None for as many as are needed.
    """

    gpus_per_node: int
    nodes_per_instance: int = 1
    nodes: int | None = None

    def __post_init__(self) -> None:
        if min(self.gpus_per_node, self.nodes_per_instance, self.nodes or 1) < 1:
            raise PlanError(f"{self}: all sizes have to be at least 1")


@dataclass(frozen=True)
class Segments:
    """An instance cut for low affinity: so many segments, in as many nodes, of `stages` stages with `tp` ranks each."""

    segments: int
    tp: int
    stages: int

    @property
    def parallel(self) -> Parallel:
        """The whole instance."""
        return Parallel(tp=self.tp, pp=self.segments * self.stages)

    @property
    def per_node(self) -> int:
        """Accelerators of one segment."""
        return self.tp * self.stages


@dataclass(frozen=True)
class Placed:
    """What an algorithm chose.

    Attributes:
        plan: with the first accelerator of every engine.
        ranks: of every engine of a role all its accelerators, stage after stage.
        goodput: requests per second of the whole by the estimates it was chosen by.
        asked: estimates that were made.
    """

    plan: Plan
    ranks: Mapping[Role, tuple[tuple[int, ...], ...]]
    goodput: float
    asked: int

    @cached_property
    def gpus(self) -> int:
        """That are used."""
        return self.plan.gpus

    def nodes(self, site: Site) -> int:
        """That are touched."""
        return len({rank // site.gpus_per_node for role in self.ranks.values() for one in role for rank in one})


def cuts(site: Site) -> Iterator[Parallel]:
    """Every tensor-parallel size within a node with every pipeline that the nodes of an instance hold."""
    for tp in range(1, site.gpus_per_node + 1):
        for pp in range(1, site.nodes_per_instance * site.gpus_per_node // tp + 1):
            yield Parallel(tp=tp, pp=pp)


def high_affinity(site: Site, rate: float, fits: Fits, goodput_prefill: Goodput, goodput_decode: Goodput) -> Placed:
    """Algorithm 1: the best instance of each kind per accelerator, and as many as the rate needs.

    Args:
        rate: requests per second that are to be served.

    Raises:
        PlanError: no instance of a kind reaches any goodput, or there are not enough nodes; it says which.
    """
    runnable = [cut for cut in cuts(site) if fits(cut)]
    best: dict[Role, tuple[Parallel, float]] = {}
    estimates: tuple[tuple[Role, Goodput], ...] = (("prefill", goodput_prefill), ("decode", goodput_decode))
    for role, goodput in estimates:
        best[role] = _best([(cut, cut.gpus) for cut in runnable], goodput, role)
    pools = [PoolPlan(role, _count(rate, goodput), cut) for role, (cut, goodput) in best.items()]
    ranks = _side_by_side(pools, site)
    served = min(pool.count * best[pool.role][1] for pool in pools)
    return _placed(pools, ranks, served, 2 * len(runnable), site)


def low_affinity(site: Site, rate: float, fits: Fits, goodput_pair: PairGoodput) -> Placed:
    """Algorithm 2: the best pair per accelerator whose segments share nodes, and as many pairs as the rate needs.

    Raises:
        PlanError: as `high_affinity`.
    """
    found = list(segment_pairs(site, fits))
    # Segments in several nodes and stages in one may come to the same instance.
    ask = cache(goodput_pair)
    (prefill, decode), goodput = _best(
        [(pair, pair[0].parallel.gpus + pair[1].parallel.gpus) for pair in found],
        lambda pair: ask(pair[0].parallel, pair[1].parallel),
        "pair",
    )
    count = _count(rate, goodput)
    pools = [PoolPlan("prefill", count, prefill.parallel), PoolPlan("decode", count, decode.parallel)]
    together = prefill.per_node + decode.per_node
    side_by_side = site.gpus_per_node // together
    ranks: dict[Role, list[tuple[int, ...]]] = {"prefill": [], "decode": []}
    for number in range(count):
        group, slot = divmod(number, side_by_side)
        nodes = [(group * prefill.segments + segment) * site.gpus_per_node for segment in range(prefill.segments)]
        start = slot * together
        ranks["prefill"].append(_over(nodes, start, prefill.per_node))
        ranks["decode"].append(_over(nodes, start + prefill.per_node, decode.per_node))
    return _placed(pools, ranks, count * goodput, ask.cache_info().misses, site)


def segment_pairs(site: Site, fits: Fits) -> Iterator[tuple[Segments, Segments]]:
    """Pairs with equally many segments of which one of each fits into a node together."""
    most = site.gpus_per_node
    for segments in range(1, site.nodes_per_instance + 1):
        inside = [Segments(segments, tp, stages) for tp in range(1, most) for stages in range(1, (most - 1) // tp + 1)]
        runnable = [one for one in inside if fits(one.parallel)]
        for prefill in runnable:
            for decode in runnable:
                if prefill.per_node + decode.per_node <= most:
                    yield prefill, decode


def _best(choices: Sequence[tuple[Choice, int]], goodput: Callable[[Choice], float], what: str) -> tuple[Choice, float]:
    """The first of those with the most goodput per accelerator."""
    if not choices:
        raise PlanError(f"{what}: the model fits into no cut of the site")
    best: tuple[Choice, float] | None = None
    most = 0.0
    for choice, gpus in choices:
        found = goodput(choice)
        if not (isfinite(found) and found >= 0):
            raise PlanError(f"{what} {choice}: a goodput of {found} requests per second")
        if found / gpus > most:
            best, most = (choice, found), found / gpus
    if best is None:
        raise PlanError(f"{what}: no cut that fits serves any request within the targets; {len(choices)} were tried")
    return best


def _count(rate: float, goodput: float) -> int:
    if not (isfinite(rate) and rate > 0):
        raise PlanError(f"a rate of {rate} requests per second")
    return max(1, ceil(rate / goodput))


def _over(nodes: list[int], start: int, size: int) -> tuple[int, ...]:
    return tuple(node + start + rank for node in nodes for rank in range(size))


def _side_by_side(pools: list[PoolPlan], site: Site) -> dict[Role, list[tuple[int, ...]]]:
    """Engines at the first free places, large ones first; a stage never straddles nodes, nor an engine without need."""
    node = site.gpus_per_node
    free: list[int] = []
    ranks: dict[Role, list[tuple[int, ...]]] = {}
    for pool in sorted(pools, key=lambda each: -each.parallel.gpus):
        tp, stages = pool.parallel.tp, pool.parallel.pp
        ranks[pool.role] = []
        for _ in range(pool.count):
            here = next((index for index, room in enumerate(free) if room >= tp * stages), None)
            if here is None:
                here = len(free)
                # Of an engine that is larger than a node, every node holds as many whole stages as it can.
                free += [node] * ceil(stages / (node // tp))
            held: list[int] = []
            for _ in range(stages):
                if free[here] < tp:
                    here += 1
                first = here * node + node - free[here]
                held += range(first, first + tp)
                free[here] -= tp
            ranks[pool.role].append(tuple(held))
    return ranks


def _placed(
    pools: list[PoolPlan], ranks: Mapping[Role, list[tuple[int, ...]]], goodput: float, asked: int, site: Site
) -> Placed:
    places = {role: tuple(each) for role, each in ranks.items()}
    plan = Plan(
        tuple(
            PoolPlan(pool.role, pool.count, pool.parallel, ranks=tuple(one[0] for one in places[pool.role]))
            for pool in pools
        )
    )
    placed = Placed(plan, places, goodput, asked)
    last = max(rank for role in places.values() for one in role for rank in one) // site.gpus_per_node + 1
    if site.nodes is not None and last > site.nodes:
        raise PlanError(f"{plan.name} needs {last} nodes, there are {site.nodes}")
    return placed
