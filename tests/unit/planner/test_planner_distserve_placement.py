"""DistServe's two placement algorithms as published: what they choose, how many, and where it stands."""

from __future__ import annotations

from math import ceil

import pytest

from vllm_suite.planner.distserve.placement import (
    Placed,
    Segments,
    Site,
    cuts,
    high_affinity,
    low_affinity,
    segment_pairs,
)
from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import PlanError


def anything(cut: Parallel) -> bool:
    return True


def flat(cut: Parallel) -> float:
    """Goodput that falls off with tensor parallelism, less with pipelines."""
    return cut.pp**0.9 * cut.tp**0.7


def check(placed: Placed, site: Site) -> None:
    """No accelerator twice, no stage over two nodes, engines as large as they say."""
    ranks = [rank for role in placed.ranks.values() for one in role for rank in one]
    assert len(set(ranks)) == len(ranks) == placed.gpus
    for pool in placed.plan.pools:
        assert len(placed.ranks[pool.role]) == pool.count
        assert pool.ranks == tuple(one[0] for one in placed.ranks[pool.role])
        for one in placed.ranks[pool.role]:
            assert len(one) == pool.parallel.gpus
            for stage in range(pool.parallel.pp):
                held = one[stage * pool.parallel.tp : (stage + 1) * pool.parallel.tp]
                assert len({rank // site.gpus_per_node for rank in held}) == 1


def test_every_cut_within_the_nodes_of_an_instance_is_tried() -> None:
    found = {(cut.tp, cut.pp) for cut in cuts(Site(4, nodes_per_instance=2))}
    assert found == {(tp, pp) for tp in (1, 2, 3, 4) for pp in range(1, 9) if tp * pp <= 8}


def test_high_affinity_chooses_and_counts_each_kind_by_itself() -> None:
    # Per accelerator: prefill is best with two ranks, decode with four stages.
    prefill = {(1, 1): 1.0, (2, 1): 2.5, (4, 1): 4.5}
    decode = {(1, 4): 30.0, (1, 1): 7.0, (2, 2): 29.0}
    site = Site(4)
    placed = high_affinity(
        site,
        31.0,
        anything,
        lambda cut: prefill.get((cut.tp, cut.pp), 0.0),
        lambda cut: decode.get((cut.tp, cut.pp), 0.0),
    )
    assert placed.plan.name == f"{ceil(31 / 2.5)} prefill tp2 | 2 decode pp4"
    assert placed.goodput == 13 * 2.5
    # Once for each kind and cut.
    assert placed.asked == 2 * len(list(cuts(site)))
    check(placed, site)


def test_of_equals_the_first_is_kept() -> None:
    placed = high_affinity(Site(4), 1.0, anything, lambda cut: float(cut.gpus), lambda cut: float(cut.gpus))
    assert placed.plan.name == "1 prefill | 1 decode"


def test_what_does_not_fit_is_not_asked_for() -> None:
    asked: list[Parallel] = []

    def goodput(cut: Parallel) -> float:
        asked.append(cut)
        return flat(cut)

    placed = high_affinity(Site(4, 2), 10.0, lambda cut: cut.gpus >= 3, goodput, flat)
    assert min(cut.gpus for cut in asked) == 3
    assert placed.asked == 2 * len(asked)


@pytest.mark.parametrize("nodes", [1, 2, 3])
@pytest.mark.parametrize("rate", [0.5, 7.0, 60.0])
def test_engines_of_high_affinity_stand_somewhere(nodes: int, rate: float) -> None:
    site = Site(8, nodes)
    # Instances of three ranks leave two of eight accelerators, and those of several nodes as many in each.
    wanted = Parallel(tp=3, pp=5) if nodes > 1 else Parallel(tp=3, pp=2)
    placed = high_affinity(site, rate, anything, lambda cut: 9.0 * (cut == wanted), flat)
    check(placed, site)
    assert placed.plan.pools[0].parallel == wanted
    for one in placed.ranks["decode"]:
        # What fits into a node is in one.
        assert len({rank // 8 for rank in one}) == ceil(len(one) / 8)


def test_large_engines_are_placed_first() -> None:
    site = Site(8, nodes=2)
    placed = high_affinity(
        site, 2.0, anything, lambda cut: float(cut == Parallel(tp=3)), lambda cut: float(cut == Parallel(tp=5))
    )
    assert placed.ranks == {"decode": ((0, 1, 2, 3, 4), (8, 9, 10, 11, 12)), "prefill": ((5, 6, 7), (13, 14, 15))}
    check(placed, site)


def test_low_affinity_is_the_best_of_all_pairs() -> None:
    site = Site(4, nodes_per_instance=2)

    def goodput(prefill: Parallel, decode: Parallel) -> float:
        return min(flat(prefill), 2 * flat(decode)) + 0.01 * prefill.tp

    def per_gpu(pair: tuple[Segments, Segments]) -> float:
        one, other = pair[0].parallel, pair[1].parallel
        return goodput(one, other) / (one.gpus + other.gpus)

    placed = low_affinity(site, 5.0, anything, goodput)
    best = max(segment_pairs(site, anything), key=per_gpu)
    first, second = placed.plan.pools
    assert (first.parallel, second.parallel) == (best[0].parallel, best[1].parallel)
    one = goodput(*(part.parallel for part in best))
    assert first.count == second.count == ceil(5.0 / one)
    assert placed.goodput == pytest.approx(first.count * one)
    check(placed, site)


def test_segments_of_a_pair_share_nodes() -> None:
    # Two segments in two nodes: two ranks of one stage of prefill and one rank of decode in each; two pairs a node.
    site = Site(6, nodes_per_instance=2)
    wanted = (Parallel(tp=2, pp=2), Parallel(pp=2))
    placed = low_affinity(site, 3.0, lambda cut: cut in wanted, lambda p, d: 1.0 if (p, d) == wanted else 0.0)
    # Both cuts also fit into one node whole, as 4 + 2 accelerators, and that is met first; without it, over two.
    assert placed.ranks["prefill"][0] == (0, 1, 2, 3)
    assert placed.ranks["decode"][0] == (4, 5)
    site = Site(3, nodes_per_instance=2)
    placed = low_affinity(site, 3.0, lambda cut: cut in wanted, lambda p, d: 1.0 if (p, d) == wanted else 0.0)
    assert placed.ranks["prefill"] == ((0, 1, 3, 4), (6, 7, 9, 10), (12, 13, 15, 16))
    assert placed.ranks["decode"] == ((2, 5), (8, 11), (14, 17))
    assert placed.nodes(site) == 6
    check(placed, site)


def test_small_pairs_share_a_node() -> None:
    site = Site(8)
    placed = low_affinity(site, 5.0, lambda cut: cut.gpus == 2, lambda p, d: 1.0)
    assert placed.ranks["prefill"][:3] == ((0, 1), (4, 5), (8, 9))
    assert placed.ranks["decode"][:3] == ((2, 3), (6, 7), (10, 11))
    assert placed.nodes(site) == 3
    check(placed, site)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 4), (2, 4), (3, 8)])
def test_the_same_segment_of_both_is_in_one_node(nodes: int, per_node: int) -> None:
    site = Site(per_node, nodes)
    for prefill, decode in segment_pairs(site, anything):
        wanted = (prefill.parallel, decode.parallel)
        if prefill.segments < nodes or prefill.stages * decode.stages > 4:
            continue
        placed = low_affinity(
            Site(per_node, nodes),
            3.0,
            anything,
            lambda p, d, wanted=wanted: float((p, d) == wanted),  # type: ignore[misc]
        )
        check(placed, site)
        for one, other in zip(placed.ranks["prefill"], placed.ranks["decode"], strict=True):
            for layer in range(12):
                # The accelerators that hold a share of the layers on both sides.
                first = one[int(layer / 12 * wanted[0].pp) * wanted[0].tp]
                second = other[int(layer / 12 * wanted[1].pp) * wanted[1].tp]
                assert first // per_node == second // per_node


def test_what_cannot_be_placed_says_why() -> None:
    with pytest.raises(PlanError, match="prefill: the model fits into no cut"):
        high_affinity(Site(4), 1.0, lambda cut: False, flat, flat)
    with pytest.raises(PlanError, match="decode: no cut that fits serves any request within the targets; 8 were"):
        high_affinity(Site(4), 1.0, anything, flat, lambda cut: 0.0)
    with pytest.raises(PlanError, match="pair: the model fits into no cut"):
        low_affinity(Site(1, nodes_per_instance=4), 1.0, anything, lambda p, d: 1.0)
    with pytest.raises(PlanError, match="a goodput of nan"):
        high_affinity(Site(4), 1.0, anything, lambda cut: float("nan"), flat)
    with pytest.raises(PlanError, match="a rate of 0"):
        high_affinity(Site(4), 0.0, anything, flat, flat)
    with pytest.raises(PlanError, match="needs 13 nodes, there are 2"):
        high_affinity(
            Site(8, nodes=2),
            50.0,
            anything,
            lambda cut: cut.tp == 1 and cut.pp == 1,
            lambda cut: cut.tp == 1 and cut.pp == 1,
        )
    with pytest.raises(PlanError, match="at least 1"):
        Site(0)
