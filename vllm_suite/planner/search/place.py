"""Where the engines of a plan stand: an engine never straddles a node without need, a group of TP never a domain."""

from __future__ import annotations

from dataclasses import replace

from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.plan import Plan


def domain(cluster: Cluster) -> int:
    """Accelerators that talk over the fastest link: an NVLink domain, or a node where there is no NVLink."""
    node = cluster.device.node
    wide = node.nvlink_domain if node.nvlink and node.nvlink_domain else node.gpus
    return min(wide, cluster.gpus)


def place(plan: Plan, cluster: Cluster) -> Plan | None:
    """The plan with the first accelerator of every engine; None where they do not fit without straddling.

    Largest engines first, each at the first free place: inside a node where it is not larger than one, else from the
    start of a node on; on a multiple of its tensor-parallel size where that divides the NVLink domain. Prefill and
    decode engines of one size take turns, so that every node has some of both and hand-overs have partners nearby.
    """
    node, fast = cluster.device.node.gpus, domain(cluster)
    free = [True] * cluster.gpus
    engines = [
        (pool.parallel.gpus, index, number) for index, pool in enumerate(plan.pools) for number in range(pool.count)
    ]
    shares = [pool.count for pool in plan.pools]
    # The k-th of n engines stands at (k + 1/2) / n of its pool, so that pools are mixed in proportion.
    engines.sort(key=lambda one: (-one[0], (one[2] + 0.5) / shares[one[1]], one[1]))
    ranks: list[list[int]] = [[0] * pool.count for pool in plan.pools]
    for size, index, number in engines:
        tp = plan.pools[index].parallel.tp
        step = node if size > node else tp if fast % tp == 0 else 1
        start = next(
            (first for first in range(0, cluster.gpus - size + 1, step) if _fits(free, first, size, node)), None
        )
        if start is None:
            return None
        free[start : start + size] = [False] * size
        ranks[index][number] = start
    pools = (replace(pool, ranks=tuple(sorted(each))) for pool, each in zip(plan.pools, ranks, strict=True))
    return Plan(tuple(pools))


def _fits(free: list[bool], first: int, size: int, node: int) -> bool:
    inside = size > node or first // node == (first + size - 1) // node
    return inside and all(free[first : first + size])
