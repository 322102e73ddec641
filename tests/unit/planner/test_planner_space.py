"""The space of plans: nothing that does not fit or that vLLM refuses, every plan once, engines where they belong."""

from __future__ import annotations

from itertools import product

import pytest

from vllm_suite.planner.hardware import Cluster, cluster
from vllm_suite.planner.models import Parallel, load, with_swiftkv
from vllm_suite.planner.models.sharding import check
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.search.choices import Choices, Settings
from vllm_suite.planner.search.place import place
from vllm_suite.planner.search.space import Space, room
from vllm_suite.planner.simulator.setting import Setting

ONE = (Settings(256, 8192),)


def space(
    name: str = "meta-llama/Llama-3.1-8B",
    gpus: str = "8xH100-SXM",
    longest: int = 5000,
    items: bool = False,
    **more: object,
) -> Space:
    model, quant = load(name)
    return space_of(model, quant, cluster(gpus), longest, items, **more)


def space_of(model, quant, hardware: Cluster, longest: int, items: bool = False, **more: object) -> Space:
    def nothing(pool: PoolPlan):
        raise AssertionError("a space asks no source")

    setting = Setting(model, quant, hardware, nothing)
    fits = room(lambda pool, encoder: setting.limits(pool, encoder=encoder).blocks * 16, longest - 1000, longest)
    return Space(model, hardware, Choices(**more), fits, items)


def test_colocated_and_disaggregated_plans_of_eight_accelerators_are_all_there_once():
    found = list(space(any=ONE, prefill=ONE, decode=ONE, pp=(1,)).plans())
    names = [plan.name for plan in found]
    colocated = [name for name in names if "|" not in name]
    assert colocated == ["8 any", "4 any tp2", "2 any tp4", "1 any tp8"]
    # By hand: for every pair of sizes the numbers after which no engine of either size fits any more.
    sizes = (1, 2, 4, 8)
    expected = {
        (p, d, n, m)
        for p, d in product(sizes, sizes)
        for n, m in product(range(1, 9), range(1, 9))
        if 0 <= 8 - n * p - m * d < min(p, d)
    }
    pairs = {
        (plan.pools[0].parallel.tp, plan.pools[1].parallel.tp, plan.pools[0].count, plan.pools[1].count)
        for plan in found
        if len(plan.pools) == 2
    }
    assert pairs == expected
    assert len(found) == len(expected) + 4
    assert len(set(found)) == len(found)


def test_the_size_is_the_number_of_plans():
    for made in (space(), space("meta-llama/Llama-3.1-70B"), space("OpenGVLab/InternVL2-26B", items=True)):
        assert made.size() == len(list(made.plans()))


def test_coarse_plans_come_first():
    made = space(pp=(1,))
    plans = list(made.plans())
    coarse = list(made.plans(0))
    assert plans[: len(coarse)] == coarse
    defaults = {"any": (1024, 8192), "prefill": (256, 8192), "decode": (1024, 8192)}
    assert all((p.max_num_seqs, p.max_num_batched_tokens) == defaults[p.role] for plan in coarse for p in plan.pools)
    assert all(plan not in set(coarse) for plan in made.plans(1))
    assert sorted(map(repr, plans)) == sorted(repr(plan) for level in range(3) for plan in made.plans(level))


def test_every_plan_fits_and_is_one_that_vllm_accepts():
    made = space("meta-llama/Llama-3.1-70B")
    for plan in made.plans():
        assert plan.gpus <= 8
        for pool in plan.pools:
            check(made.model, pool.parallel)
            # 141 GB of weights do not fit on one of 85.5 GB.
            assert pool.parallel.gpus >= 2
            assert pool.max_num_seqs <= pool.max_num_batched_tokens


def test_longer_requests_need_larger_engines():
    # 16 GB of weights leave about 420,000 tokens of 128 KiB on one H100.
    assert "8 any" in [plan.name for plan in space(longest=100_000).plans(0)]
    assert "8 any" not in [plan.name for plan in space(longest=500_000).plans(0)]
    assert "4 any tp2" in [plan.name for plan in space(longest=500_000).plans(0)]


def test_a_model_that_fits_nowhere_is_an_error_that_says_so():
    with pytest.raises(PlanError, match=r"no plan of meta-llama/Llama-3.1-405B fits on 2 x L40S: 3 cuts .*=fp8"):
        list(space("meta-llama/Llama-3.1-405B", "2xL40S").plans())


def test_tensor_parallelism_stays_on_the_fast_link():
    # Four cards of 48 GB in a node, no NVLink: a group stays in its node.
    for plan in space("meta-llama/Llama-3.1-8B", "16xL40S").plans(0):
        assert all(pool.parallel.tp <= cluster("16xL40S").device.node.gpus for pool in plan.pools)
    wide = space("meta-llama/Llama-3.1-70B", "16xH100-SXM", wide_tp=True, tp=(16,), pp=(1,))
    assert [plan.name for plan in wide.plans(0)] == [] or all("tp16" in plan.name for plan in wide.plans(0))
    assert not space("meta-llama/Llama-3.1-70B", "16xH100-SXM", tp=(16,), pp=(1,)).engines("any")


def test_experts_are_cut_or_spread_and_attention_replicated():
    made = space("Qwen/Qwen3-30B-A3B", any=ONE, kinds=("any",))
    cuts = {pool.parallel for pool in made.engines("any")}
    assert Parallel(tp=2, dp=4, ep=True) in cuts
    assert Parallel(tp=1, dp=8, ep=True) in cuts
    # 768 wide experts over 8 ranks: accepted whole or cut.
    assert Parallel(tp=8) in cuts
    assert Parallel(tp=8, ep=True) in cuts
    assert Parallel(ep=True) not in cuts
    assert all(pool.parallel.dp == 1 and not pool.parallel.ep for pool in space().engines("any"))


def test_encoders_only_where_there_is_something_to_encode():
    name = "OpenGVLab/InternVL2-26B"
    more = {"any": ONE, "prefill": ONE, "decode": ONE}
    assert space(name, items=False, **more).kinds == ("any", "prefill+decode")
    made = space(name, items=True, **more)
    assert made.kinds == ("any", "prefill+decode", "encode+any", "encode+prefill+decode")
    assert space(items=True).kinds == ("any", "prefill+decode")
    roles = {tuple(pool.role for pool in plan.pools) for plan in made.plans()}
    assert ("encode", "any") in roles
    assert ("encode", "prefill", "decode") in roles
    assert "5 encode | 2 prefill | 1 decode" in [plan.name for plan in made.plans()]


def test_prefill_instances_of_a_swiftkv_model_leave_out_its_late_layers():
    model, quant = load("meta-llama/Llama-3.1-8B")
    made = space_of(with_swiftkv(model, 16, 1), quant, cluster("2xH100-SXM"), 5000)
    pools = [pool for plan in made.plans(0) for pool in plan.pools]
    assert {pool.late_kv_only for pool in pools if pool.role == "prefill"} == {True}
    assert {pool.late_kv_only for pool in pools if pool.role != "prefill"} == {False}


def test_pipeline_stages_are_for_engines_that_hand_nothing_over():
    found = {
        (pool.role, pool.parallel.pp)
        for plan in space("Qwen/Qwen2.5-VL-7B-Instruct", "2xH100-SXM", 9000, True).plans()
        for pool in plan.pools
    }
    assert found == {("any", 1), ("any", 2), ("prefill", 1), ("decode", 1), ("encode", 1)}
    # Asked for, as in DistServe's published plans; but encoder outputs are not taken by pipeline stages.
    asked = list(space("Qwen/Qwen2.5-VL-7B-Instruct", "8xH100-SXM", 9000, True, pp=(2,)).plans())
    assert {tuple(pool.role for pool in plan.pools) for plan in asked} == {("any",), ("prefill", "decode")}


def test_engines_stand_apart_and_inside_their_nodes():
    hardware = cluster("24xH100-SXM")
    plan = Plan((PoolPlan("prefill", 3, Parallel(tp=2)), PoolPlan("decode", 2, Parallel(tp=4)),
                 PoolPlan("encode", 2)))  # fmt: skip
    for made in (plan, Plan((PoolPlan("prefill", 1, Parallel(tp=8, pp=2)), PoolPlan("decode", 3, Parallel(tp=2))))):
        placed = place(made, hardware)
        assert placed is not None
        taken = [
            rank for pool in placed.pools for first in pool.ranks for rank in range(first, first + pool.parallel.gpus)
        ]
        assert len(taken) == len(set(taken)) == made.gpus
        assert max(taken) < 24
        for pool in placed.pools:
            for first in pool.ranks:
                if pool.parallel.gpus <= 8:
                    assert first // 8 == (first + pool.parallel.gpus - 1) // 8
                else:
                    assert first % 8 == 0


def test_what_cannot_stand_without_straddling_is_no_plan():
    # Two engines of three on two nodes of four: each in its own node. A third has two accelerators, in two nodes.
    hardware = cluster("8xL40S").model_copy(
        update={"device": cluster("L40S").device.model_copy(
            update={"node": cluster("L40S").device.node.model_copy(update={"gpus": 4})})}
    )  # fmt: skip
    assert place(Plan((PoolPlan("any", 2, Parallel(pp=3)),)), hardware) is not None
    two = Plan((PoolPlan("any", 2, Parallel(pp=3)), PoolPlan("encode", 1, Parallel(tp=2))))
    assert place(two, hardware) is None


def test_prefill_and_decode_engines_share_nodes():
    placed = place(
        Plan((PoolPlan("prefill", 4, Parallel(tp=2)), PoolPlan("decode", 4, Parallel(tp=2)))), cluster("16xH100-SXM")
    )
    assert placed is not None
    prefill, decode = ({rank // 8 for rank in pool.ranks} for pool in placed.pools)
    assert prefill == decode == {0, 1}


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("tp", "'tp' is not NAME=VALUE"),
        ("tp=0", "tp is whole numbers above 0, not 0"),
        ("colour=red", "no 'colour'; there are tp, pp"),
        ("kinds=pq", "no kind 'pq'; there are colocated, pd"),
        ("quant=fp7", "weights is one of .*, not 'fp7'"),
        ("idle=maybe", "idle is yes or no, not 'maybe'"),
    ],
)
def test_words_that_are_no_part_of_a_space_are_named(word, says):
    with pytest.raises(PlanError, match=says):
        Choices.parse([word], load("meta-llama/Llama-3.1-8B").stored)


def test_words_narrow_the_space():
    own = load("meta-llama/Llama-3.1-8B").stored
    found = Choices.parse(["tp=1,2", "kinds=colocated,pd", "seqs=64,256", "tokens=2048", "quant=own,fp8+kv"], own)
    assert found.tp == (1, 2)
    assert found.kinds == ("any", "prefill+decode")
    assert found.any == found.decode == (Settings(64, 2048), Settings(256, 2048))
    assert found.quants[0] is None
    assert found.quants[1] is not None
    assert (found.quants[1].weights, found.quants[1].kv) == ("fp8", "fp8")
    with pytest.raises(PlanError, match="max_num_seqs is above every"):
        Choices.parse(["seqs=512", "tokens=256"], own)
