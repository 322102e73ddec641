"""Simulated fleets of prefill and decode pools: queueing formulas, the router and its links, what is conserved."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace
from typing import Literal

import pytest
from fleets import (
    CLUSTER,
    MODEL,
    QUANT,
    SOURCE,
    Watch,
    plan,
    poisson,
    pull_seconds,
    serve,
    setting,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import ExactSource

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.handover import Costs, Place
from vllm_suite.planner.simulator.links import Cost, Links
from vllm_suite.planner.simulator.routing import LeastTokens, Member, PrefixHistory
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.linear import distserve
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.workload import Request
from vllm_suite.router.config import Policies
from vllm_suite.router.members import PrefixHistory as RouterHistory
from vllm_suite.router.policies import Candidate, Demand
from vllm_suite.router.policies import LeastTokens as RouterLeastTokens

PD = plan(prefill={}, decode={})


def test_the_router_forgets_the_oldest_beginnings() -> None:
    history, chunks = PrefixHistory(4 * 128), RouterHistory(4)
    for prefix in ((1, 2), (1, 3), (4,), (1, 2, 5)):
        history.add(prefix, 128)
        chunks.add(hash(prefix[: end + 1]) for end in range(len(prefix)))
        for asked in ((1, 2, 5), (1, 3), (4,), (5,)):
            expected = chunks.matched(hash(asked[: end + 1]) for end in range(len(asked)))
            assert history.matched(asked) == 128 * expected


def test_pulls_share_their_instances_links() -> None:
    clock, ends = Clock(), dict[str, float]()
    links = Links(clock)
    moves = [("a", 0, 9, 0.0), ("b", 1, 9, 0.5), ("c", 2, 8, 0.5)]
    for index, (name, source, target, at) in enumerate(moves):

        def begin(now: float, version: int, name: str = name, source: int = source, target: int = target) -> None:
            links.start(source, target, Cost(0.0, 1.0, 0.0), now, lambda then: ends.__setitem__(name, then))

        clock.post(at, 0, index, 0, begin)
    clock.run()
    # a is alone until 0.5 and then halves the target's link with b; b has half of its work left when a ends.
    assert ends == {"a": 1.5, "b": 2.0, "c": 1.5}


def test_what_comes_before_the_first_byte_is_not_shared() -> None:
    clock, ends = Clock(), dict[str, float]()
    links = Links(clock)
    for index, (name, at) in enumerate([("a", 0.0), ("b", 0.0), ("c", 1.0)]):

        def begin(now: float, version: int, name: str = name) -> None:
            links.start(ord(name), 9, Cost(1.0, 2.0, 0.0), now, lambda then: ends.__setitem__(name, then))

        clock.post(at, 0, index, 0, begin)
    clock.run()
    # From 1 s on there are three; a and b have 2 s of bytes at a third of the rate, until 7 s. c begins at 2 s, has
    # 1/3 s of its 2 s left then, and the link for itself.
    assert ends == pytest.approx({"a": 7.0, "b": 7.0, "c": 7.0 + 1 / 3})


def test_transfers_between_nodes_take_the_network() -> None:
    costs = Costs(Setting(MODEL, QUANT, CLUSTER.model_copy(update={"gpus": 16}), lambda pool: SOURCE))
    one = PoolPlan("any", 1)
    near, far = (costs.kv(Place(rank, 0, one), Place(rank + 1, rank, one), 32) for rank in (1, 8))
    assert near.size == far.size == 32 * 16 * 131072
    assert far.seconds > 2 * near.seconds
    assert near.setup + near.seconds == pytest.approx(pull_seconds(32))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000)), min_size=1, max_size=60), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_instances_are_chosen_as_the_router_chooses(legs: list[tuple[int, int]], count: int) -> None:
    ours = [Member("decode", Place(index, index, PoolPlan("decode", 1))) for index in range(count)]
    chosen, policy, router = list[tuple[Member, int]](), LeastTokens(), RouterLeastTokens(Policies())
    for ends, tokens in legs:
        for _ in range(min(ends, len(chosen))):
            member, size = chosen.pop(0)
            member.discharge(size)
        candidates = [Candidate(str(at), "", at, each.requests, each.tokens, 0) for at, each in enumerate(ours)]
        theirs = router.choose(candidates, Demand(tokens, None))
        member = policy.choose(ours)
        assert member is ours[theirs]
        member.charge(tokens)
        chosen.append((member, tokens))


@pytest.mark.parametrize("load", [0.3, 0.6])
def test_prefill_before_decode_is_an_m_d_1_queue(load: float) -> None:
    # DistServe's equation 1 for one prefill engine, seen by the client who gets prefill's token.
    source = distserve("facebook/opt-13b", 1)
    duration = source.step_seconds(Steps.of([(512, 0)]))
    rate = load / duration
    one = plan(prefill={"max_num_seqs": 1}, decode={"count": 2, "kv_blocks": 100_000})
    ttft, count = 0.0, 12_000

    def sink(served: Served) -> None:
        nonlocal ttft
        ttft += served.ttft

    quick = ExactSource(0.001, 0.0)
    of = replace(
        setting(serving=Serving(min_prompt_tokens=0, streams="prefill")),
        source=lambda pool: source if pool.role == "prefill" else quick,
    )
    simulate_plan(one, of, poisson(count, rate, 512, 2, seed=1), sink)
    expected = duration + rate * duration**2 / (2 * (1 - load))
    assert ttft / count == pytest.approx(expected, rel=0.03)


def test_two_pools_are_queues_in_tandem() -> None:
    # With fixed times the total wait before two servers in a row is that before the slower one alone.
    one = plan(prefill={"max_num_seqs": 1}, decode={"max_num_seqs": 1, "kv_blocks": 100_000})
    prefill, decode = 1.0 + 8 * 0.125, 1.0 + 2.0
    rate = 0.5 / decode
    latency = 0.0

    def sink(served: Served) -> None:
        nonlocal latency
        latency += served.latency

    simulate_plan(one, setting(), poisson(12_000, rate, 8, 3, seed=2), sink)
    waits = rate * decode**2 / (2 * (1 - rate * decode))
    assert latency / 12_000 == pytest.approx(prefill + decode + waits, rel=0.03)


def mixed(count: int, seed: int) -> list[Request]:
    draw, now, found = random.Random(seed), 0.0, list[Request]()
    for number in range(count):
        now += draw.choice([0.0, 0.5, 4.0])
        prompt, prefix = draw.randrange(1, 60), tuple(draw.randrange(2) for _ in range(draw.randrange(3)))
        found.append(Request(number, now, prompt, draw.randrange(1, 40), prefix, 16, label=str(number % 3)))
    return found


shapes = st.fixed_dictionaries(
    {
        "prefill": st.fixed_dictionaries({"count": st.integers(1, 3), "kv_blocks": st.integers(4, 12)}),
        "decode": st.fixed_dictionaries(
            {
                "count": st.integers(1, 2),
                "kv_blocks": st.integers(7, 20),
                "max_num_seqs": st.integers(1, 6),
                "max_num_batched_tokens": st.integers(6, 64),
            }
        ),
    }
)


@given(
    shapes,
    st.integers(0, 1000),
    st.sampled_from(["decode", "prefill"]),
    st.sampled_from([0, 30]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([600.0, 3.0]),
    st.booleans(),
    st.sampled_from([(False, False), (True, False), (True, True)]),
    st.integers(1, 2),
    st.integers(1, 2),
)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost(
    has: dict[str, dict[str, int]],
    seed: int,
    streams: Literal["decode", "prefill"],
    shortest: int,
    hop: float,
    hold: float,
    caching: bool,
    ahead: tuple[bool, bool],
    stages: int,
    ranks: int,
) -> None:
    watch, requests = Watch(), mixed(40, seed)
    source = ExactSource(1.0, 0.125)
    source.stages = stages
    of = setting(
        source,
        serving=Serving(min_prompt_tokens=shortest, streams=streams, hop_s=hop, max_hold_s=hold),
        prefix_caching=caching,
        async_scheduling=ahead[0],
        by_length=ahead[1],
    )
    has["prefill"]["max_num_batched_tokens"] = 64
    has["prefill"]["max_num_seqs"] = 8
    pools = {role: {**sizes, "parallel": Parallel(dp=ranks, pp=stages)} for role, sizes in has.items()}
    served, run = serve(plan(**pools), of, requests, observer=watch)
    assert [one.number for one in served] == list(range(40))
    assert watch.empty()
    for one, request in zip(served, requests, strict=True):
        assert (one.arrival, one.prompt, one.output, one.label) == (
            request.arrival, request.prompt, request.output, request.label,
        )  # fmt: skip
        stages = [one.arrival, one.prefill_start, one.prefilled, one.transfer_start, one.transferred, one.decode_start]
        known = [stage for stage in stages if stage == stage]
        assert known == sorted(known)
        assert one.prefilled <= one.last_token
        assert one.first_token <= one.last_token
        assert one.ttft >= 0
        assert -1e-9 <= one.queue_s <= one.latency
        assert one.longest_gap <= one.last_token - one.first_token + 1e-9
        assert one.longest_gap >= one.tpot - 1e-9
    assert run.end == max(one.last_token for one in served)
    for pool in run.pools.values():
        assert 0 <= pool.kv_mean <= pool.kv_max <= 1
        # Ahead, without known lengths, a step too many is computed after the last token.
        assert all(busy <= run.end + (9.0 if ahead == (True, False) else 1e-9) for busy in pool.busy)
        assert pool.waited >= -1e-9


def test_runs_are_deterministic() -> None:
    tight = plan(prefill={"count": 2, "kv_blocks": 8}, decode={"count": 2, "kv_blocks": 10, "max_num_seqs": 4})
    found = [serve(tight, setting(), mixed(200, 3)) for _ in range(2)]
    assert [repr(one) for one in found[0][0]] == [repr(one) for one in found[1][0]]
    assert found[0][1] == found[1][1]


def test_memory_does_not_grow_with_the_trace() -> None:
    peaks = []
    for count in (500, 4000):
        tracemalloc.start()
        simulate_plan(PD, setting(ExactSource(0.01, 0.0)), poisson(count, 10.0, 64, 16), lambda served: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
