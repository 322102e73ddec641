"""APEX's plan space: the 26 plans of Llama-70B on 8 x H100, and its rules for cells, memory and exchanges."""

from __future__ import annotations

import pytest

from vllm_suite.planner.apex.space import Block, Exchange, Scheme, exchange, schemes
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Parallel, load
from vllm_suite.planner.models.shapes import ModelError
from vllm_suite.planner.models.sharding import check

# Model replicas, stages, attention (replicas, tp), feed-forward (replicas, tp), GiB of weights: printed by
# microsoft/apex_plus at 8769096 for `llama3-70b` on one node of eight H100, half precision.
PUBLISHED = [
    (1, 1, (1, 8), (1, 8), 15.9), (1, 1, (2, 4), (1, 8), 18.8), (1, 1, (4, 2), (1, 8), 24.4),
    (1, 1, (8, 1), (1, 8), 35.6), (1, 1, (1, 8), (2, 4), 29.1), (1, 1, (1, 8), (4, 2), 55.3),
    (1, 2, (1, 4), (1, 4), 15.9), (1, 2, (2, 2), (1, 4), 18.8), (1, 2, (4, 1), (1, 4), 24.4),
    (1, 2, (1, 4), (2, 2), 29.1), (1, 2, (1, 4), (4, 1), 55.3), (1, 4, (1, 2), (1, 2), 15.9),
    (1, 4, (2, 1), (1, 2), 18.8), (1, 4, (1, 2), (2, 1), 29.1), (1, 8, (1, 1), (1, 1), 15.9),
    (2, 1, (1, 4), (1, 4), 31.9), (2, 1, (2, 2), (1, 4), 37.5), (2, 1, (4, 1), (1, 4), 48.8),
    (2, 1, (1, 4), (2, 2), 58.1), (2, 2, (1, 2), (1, 2), 31.9), (2, 2, (2, 1), (1, 2), 37.5),
    (2, 2, (1, 2), (2, 1), 58.1), (2, 4, (1, 1), (1, 1), 31.9), (4, 1, (1, 2), (1, 2), 63.8),
    (4, 1, (2, 1), (1, 2), 75.0), (4, 2, (1, 1), (1, 1), 63.8),
]  # fmt: skip


def block(name: str = "meta-llama/Llama-3.1-70B") -> Block:
    return Block.of(*load(name))


def test_the_plans_of_llama_70b_on_eight_h100_are_apexs() -> None:
    found = list(schemes(block(), cluster("8xH100-SXM")))
    ours = [(each.replicas, each.stages, each.attention, each.feed_forward) for each in found]
    assert sorted(ours) == sorted(row[:4] for row in PUBLISHED)
    weights = {each: scheme.weight_bytes(block()) / 2**30 for each, scheme in zip(ours, found, strict=True)}
    for *plan, published in PUBLISHED:
        assert weights[tuple(plan)] == pytest.approx(published, abs=0.051)  # type: ignore[index]


def test_more_memory_admits_more_plans() -> None:
    less, more = (set(schemes(block(), cluster(name))) for name in ("8xH100-SXM", "8xH200"))
    assert less < more
    most = {scheme.weight_bytes(block()) for scheme in more - less}
    assert min(most) > 80 * 2**30
    assert max(most) <= 141 * 2**30


def test_layers_divide_into_stages_and_parts_into_nodes() -> None:
    # 80 layers: no three stages on six GPUs. Two nodes of eight: parts are whole nodes or equal shares of each.
    assert {each.stages for each in schemes(block(), cluster("6xH200"))} <= {1, 2}
    for each in schemes(block(), cluster("16xH200")):
        for parts in (each.replicas, each.replicas * each.stages, each.replicas * each.stages * each.attention[0]):
            assert parts in (1, 2, 4, 8, 16)
    # Three nodes are not cut into two or four.
    assert {each.replicas for each in schemes(block(), cluster("24xH200"))} <= {1, 3, 6, 12, 24}
    # Without NVLink six devices are not three pairs.
    small = block("meta-llama/Llama-3.1-8B")
    assert {each.replicas for each in schemes(small, cluster("6xL40S"))} == {1, 2}
    assert {each.replicas for each in schemes(small, cluster("6xH100-SXM"))} == {1, 2, 3, 6}


def test_replicas_of_cells_divide_each_other_and_have_no_common_divisor() -> None:
    found = {(each.attention[0], each.feed_forward[0]) for each in schemes(block(), cluster("8xH200"))}
    # On six devices two and three have no common divisor and do not divide each other.
    six = {(each.attention[0], each.feed_forward[0]) for each in schemes(block(), cluster("6xH200"))}
    assert (1, 8) in found
    assert (3, 1) in six
    assert all(min(pair) == 1 for pair in found | six)


def test_experts_may_stay_whole() -> None:
    mixtral = block("mistralai/Mixtral-8x7B-v0.1")
    found = list(schemes(mixtral, cluster("4xH100-SXM")))
    spread = [each for each in found if each.whole_experts]
    assert spread
    assert all(1 < each.feed_forward[1] <= 8 for each in spread)
    whole, cut = Scheme(1, 1, (1, 4), (1, 4), True), Scheme(1, 1, (1, 4), (1, 4))
    assert whole in spread
    assert cut in found
    assert whole.weight_bytes(mixtral) == cut.weight_bytes(mixtral)


def test_what_moves_between_cells() -> None:
    dense, mixtral = block(), block("mistralai/Mixtral-8x7B-v0.1")
    reduce, gather, scatter = "all_reduce", "all_gather", "reduce_scatter"
    # Equal replicas: attention is reduced; a gated network is reduced inside and gathered behind.
    assert exchange(dense, Scheme(1, 1, (1, 8), (1, 8))) == (
        (Exchange(reduce, 8),),
        (Exchange(reduce, 8), Exchange(gather, 8)),
    )
    # From few wide cells to many narrow ones and back.
    assert exchange(dense, Scheme(1, 1, (4, 2), (1, 8))) == (
        (Exchange(scatter, 2), Exchange(gather, 8)),
        (Exchange(reduce, 8), Exchange("all_to_all", 8), Exchange(gather, 2)),
    )
    assert exchange(dense, Scheme(1, 1, (1, 8), (4, 2))) == (
        (Exchange(scatter, 8), Exchange(gather, 2)),
        (Exchange(reduce, 2), Exchange(gather, 8)),
    )
    # Two experts used of eight, spread over four devices: tokens go out twice and come back as one.
    assert exchange(mixtral, Scheme(1, 1, (1, 4), (1, 4), True)) == (
        (Exchange(scatter, 4), Exchange("all_to_all", 4, 2.0)),
        (Exchange("all_to_all", 4, 2.0), Exchange(gather, 4, 0.5)),
    )
    # Sliced experts are reduced like a network without a gate.
    assert exchange(mixtral, Scheme(1, 1, (1, 4), (1, 4)))[1] == (Exchange(reduce, 4),)


def test_schemes_that_vllm_can_start() -> None:
    found = [each.plan(block()) for each in schemes(block(), cluster("8xH100-SXM"))]
    cuts = {(plan.pools[0].count, plan.pools[0].parallel.pp, plan.pools[0].parallel.tp) for plan in found if plan}
    assert cuts == {(1, 1, 8), (1, 2, 4), (1, 4, 2), (1, 8, 1), (2, 1, 4), (2, 2, 2), (2, 4, 1), (4, 1, 2), (4, 2, 1)}
    assert all(plan.gpus == 8 for plan in found if plan)
    mixtral = block("mistralai/Mixtral-8x7B-v0.1")
    wide = Scheme(2, 1, (2, 2), (1, 4), True).plan(mixtral)
    assert wide is not None
    assert wide.pools[0].parallel == Parallel(tp=2, dp=2, ep=True)
    check(load("mistralai/Mixtral-8x7B-v0.1")[0], wide.pools[0].parallel)
    assert Scheme(1, 1, (1, 4), (2, 2)).plan(mixtral) is None
    assert Scheme(1, 1, (2, 2), (1, 4)).plan(block()) is None


def test_heads_on_a_device() -> None:
    llama = block()
    assert [llama.heads_on(devices) for devices in (1, 2, 8)] == [(64, 8), (32, 4), (8, 1)]
    # More devices than KV heads: each holds one whole KV head and a share of its queries.
    assert llama.heads_on(16) == (4, 1)


@pytest.mark.parametrize("name", ["deepseek-ai/DeepSeek-V3", "google/gemma-3-27b-it"])
def test_models_of_several_kinds_of_layers_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match="one kind of block"):
        block(name)
