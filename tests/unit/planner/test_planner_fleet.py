"""Simulated fleets of prefill and decode pools: schedules by hand, queueing formulas, the router, what is conserved."""

from __future__ import annotations

import math
import random
import tracemalloc
from dataclasses import replace
from typing import Literal

import pytest
from fleets import (
    ALL_DISAGGREGATED,
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
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.handover import Costs, Place
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.links import Cost, Links
from vllm_suite.planner.simulator.order import LengthOrder
from vllm_suite.planner.simulator.routing import LeastTokens, Member, PrefixHistory
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.simulator.step_sources import LastTokens
from vllm_suite.planner.sources.linear import distserve
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.workload import Request
from vllm_suite.router.config import Policies
from vllm_suite.router.members import PrefixHistory as RouterHistory
from vllm_suite.router.policies import Candidate, Demand
from vllm_suite.router.policies import LeastTokens as RouterLeastTokens

PD = plan(prefill={}, decode={})


def test_a_request_goes_through_prefill_pull_and_decode() -> None:
    (one,), run = serve(PD, setting(), [Request(0, 1.0, 8, 3)])
    pull = pull_seconds(1)
    # 2 s of prefill, the pull, the last prompt token again in a second, and two more tokens.
    assert (one.prefill_start, one.prefilled, one.transfer_start) == (1.0, 3.0, 3.0)
    assert one.transferred == pytest.approx(3.0 + pull, rel=1e-12)
    assert one.decode_start == one.transferred
    assert one.first_token == pytest.approx(4.0 + pull, rel=1e-12)
    assert one.last_token == pytest.approx(6.0 + pull, rel=1e-12)
    assert (one.longest_gap, one.queue_s) == (pytest.approx(1.0), 0.0)
    assert math.isnan(one.encoded)
    assert run.end == one.last_token
    decode = run.pools["decode"]
    assert (decode.transfers, decode.transfer_bytes) == (1, 16 * 32 * 2 * 1024 * 2)
    assert decode.transfer_seconds == pytest.approx(pull)
    # Prefill holds its block from 1.0 to the end of the pull, decode from the pull's start to the end.
    prefill = run.pools["prefill"]
    assert prefill.kv_mean == pytest.approx((2.0 + pull) / 1000 / run.end)
    # Growth counts before it fills a block.
    assert decode.kv_mean == pytest.approx((3.0 + 0.125 + pull) / 1000 / run.end)
    assert (prefill.kv_max, prefill.utilisation) == (0.001, pytest.approx(2.0 / run.end))


def test_prefills_token_may_be_the_clients_first() -> None:
    (one,), _ = serve(PD, setting(serving=Serving(min_prompt_tokens=0, streams="prefill")), [Request(0, 0.0, 8, 3)])
    pull = pull_seconds(1)
    assert (one.first_token, one.prefilled) == (2.0, 2.0)
    assert one.last_token == pytest.approx(2.0 + pull + 1.0 + 1.0)
    assert one.longest_gap == pytest.approx(pull + 1.0)
    (one,), run = serve(PD, setting(serving=Serving(min_prompt_tokens=0, streams="prefill")), [Request(0, 0.0, 8, 1)])
    assert (one.first_token, one.last_token, run.pools["decode"].transfers) == (2.0, 2.0, 0)


def test_a_prompt_of_the_shortest_length_is_disaggregated() -> None:
    (one,), _ = serve(PD, setting(serving=Serving(min_prompt_tokens=8)), [Request(0, 0.0, 8, 3)])
    assert one.transferred > one.prefilled


def test_a_short_prompt_goes_straight_to_decode() -> None:
    (one,), run = serve(PD, setting(serving=Serving(min_prompt_tokens=9)), [Request(0, 0.0, 8, 3)])
    assert (one.prefill_start, one.first_token, one.last_token) == (0.0, 2.0, 4.0)
    assert math.isnan(one.transferred)
    assert math.isnan(one.decode_start)
    assert run.pools["prefill"].steps == (0,)


def test_a_prompt_that_decode_mostly_has_goes_straight_there() -> None:
    given_setting = setting(serving=Serving(min_prompt_tokens=16, max_cached_fraction=0.5), prefix_caching=True)
    requests = [
        Request(0, 0.0, 64, 2, prefix=(1, 2), block=16),
        # The whole prefix again: half of 64 tokens is not more than half, of 63 it is; and 15 tokens are too few.
        Request(1, 50.0, 64, 2, prefix=(1, 2), block=16),
        Request(2, 100.0, 63, 2, prefix=(1, 2), block=16),
        Request(3, 150.0, 300, 2, prefix=(2, 1), block=16),
        Request(4, 200.0, 300, 2, prefix=(2, 1, *range(5, 21)), block=16),
        Request(5, 300.0, 302, 2, prefix=(2, 1, *range(5, 21)), block=16),
    ]
    served, _ = serve(PD, given_setting, requests)
    assert [math.isnan(one.transferred) for one in served] == [False, False, True, False, False, True]
    # What decode has is not computed there.
    assert served[2].cached == 32
    assert served[2].first_token - served[2].prefill_start == 1.0 + 31 / 8


def test_the_router_forgets_the_oldest_beginnings() -> None:
    history, chunks = PrefixHistory(4 * 128), RouterHistory(4)
    for prefix in ((1, 2), (1, 3), (4,), (1, 2, 5)):
        history.add(prefix, 128)
        chunks.add(hash(prefix[: end + 1]) for end in range(len(prefix)))
        for asked in ((1, 2, 5), (1, 3), (4,), (5,)):
            expected = chunks.matched(hash(asked[: end + 1]) for end in range(len(asked)))
            assert history.matched(asked) == 128 * expected


def test_a_last_prompt_token_costs_what_a_decoded_one_does() -> None:
    source = ExactSource(1.0, 0.125, key=0.25, longest=0.5, shortest=2.0)
    last = LastTokens(source)
    # Beside two that decode, one token after 9 in the cache: contexts of 4, 10 and 20.
    mixed_step, decoded = Steps.of([(1, 9)], [4, 20]), Steps.of(contexts=[4, 10, 20])
    assert last.step_seconds(mixed_step) == source.step_seconds(decoded)
    assert last.step_seconds(Steps.of([(1, 9)])) == source.step_seconds(Steps.of(contexts=[10]))
    for chunks in ([(2, 9)], [(1, 0)], [(1, 9), (2, 0)]):
        assert last.step_seconds(Steps.of(chunks, [4])) == source.step_seconds(Steps.of(chunks, [4]))


def test_a_decode_instance_serves_in_an_order_of_its_own() -> None:
    # Once it has seen requests of both classes, the short ones of those that wait for their pull go first.
    def request(number: int, arrival: float, long: bool) -> Request:
        return Request(number, arrival, 65, 60 if long else 2, label="long" if long else "short")

    seen = [request(n, 200.0 * n, n % 2 == 0) for n in range(8)]
    waiting = [request(8 + n, 2000.0, n < 4) for n in range(8)]
    # A prompt takes 5 of 8 blocks, so one is pulled at a time.
    one_place = plan(prefill={}, decode={"max_num_seqs": 1, "kv_blocks": 8})
    ended = []
    for queue in (None, lambda: LengthOrder("kappa", kappa=1.0)):
        served, _ = serve(one_place, setting(queue=queue), seen + waiting)
        ended.append([one.label for one in sorted(served[8:], key=lambda one: one.last_token)])
    assert ended == [["long"] * 4 + ["short"] * 4, ["short"] * 4 + ["long"] * 4]


def test_each_stage_is_a_hop_from_the_router() -> None:
    (one,), _ = serve(PD, setting(serving=Serving(min_prompt_tokens=0, hop_s=0.25)), [Request(0, 0.0, 8, 1)])
    assert (one.prefilled, one.transfer_start) == (2.0, 2.25)
    (one,), _ = serve(PD, setting(serving=Serving(min_prompt_tokens=0, pull_s=0.5)), [Request(0, 0.0, 8, 1)])
    assert one.transferred - one.transfer_start == pytest.approx(0.5 + pull_seconds(1))


def test_blocks_stay_on_prefill_until_they_are_pulled() -> None:
    # Prefill has room for one prompt. Decode has room for one request, which runs until 3 + pull + 10.
    tight = plan(prefill={"kv_blocks": 1}, decode={"kv_blocks": 2})
    watch = Watch()
    first, second, third = serve(tight, setting(), [Request(n, 0.0, 16, 10) for n in range(3)], observer=watch)[0]
    pull = pull_seconds(1)
    assert first.prefilled == 3.0
    # The first pull ends and gives prefill its block; the second prompt is then computed, and pulled beside the first
    # request only in the step in which that has its second block or is done.
    assert second.prefill_start == pytest.approx(3.0 + pull)
    assert first.last_token == pytest.approx(3.0 + pull + 1.0 + 9.0)
    assert second.transfer_start == pytest.approx(first.last_token)
    assert third.prefill_start == pytest.approx(second.transferred)
    assert watch.empty()


def test_a_pull_takes_its_blocks_at_once_and_its_place_later() -> None:
    # One place among decode's running: the second request's pull waits until the first is done.
    one_place = plan(prefill={"count": 2}, decode={"max_num_seqs": 1})
    # Equally loaded instances take turns, and the first turn is that of the second one.
    second, first = serve(one_place, setting(), [Request(0, 0.0, 8, 4), Request(1, 0.0, 8, 4)])[0]
    assert (first.prefilled, second.prefilled) == (2.0, 2.0)
    assert second.transfer_start == first.transfer_start == 2.0
    assert second.transferred > first.transferred - 1e-9
    # Both were pulled when nobody ran; the second then waits for the place.
    assert second.decode_start == pytest.approx(first.last_token)


def test_blocks_that_nobody_pulls_are_given_up() -> None:
    held = setting(serving=Serving(min_prompt_tokens=0, max_hold_s=10.0))
    watch = Watch()
    tight = plan(prefill={"kv_blocks": 7}, decode={"kv_blocks": 7})
    jobs = [Request(0, 0.0, 96, 17), Request(1, 0.0, 32, 2), Request(2, 20.0, 112, 1)]
    (first, lost, third), run = serve(tight, held, jobs, observer=watch)
    # The first takes decode's cache until 30 s. Prefill has the second's blocks at 18 s and keeps them for 10 s.
    assert 30.0 < first.last_token < 31.0
    assert lost.prefilled == pytest.approx(18.0 + pull_seconds(6))
    assert math.isnan(lost.transferred)
    # Decode computes all of its prompt: 5 s for 32 tokens.
    assert lost.decode_start == first.last_token
    assert lost.first_token == pytest.approx(lost.decode_start + 5.0)
    # The third needs all of prefill's blocks.
    assert third.prefill_start == pytest.approx(lost.prefilled + 10.0)
    assert watch.empty()
    assert run.pools["decode"].transfers == 2


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


def test_data_parallel_ranks_have_schedulers_of_their_own() -> None:
    wide = Plan((PoolPlan("any", 1, Parallel(tp=2, dp=2), max_num_seqs=1, kv_blocks=100),))
    served, run = serve(wide, setting(), [Request(n, 0.0, 8, 1) for n in range(4)])
    assert sorted(one.first_token for one in served) == [2.0, 2.0, 4.0, 4.0]
    assert len(run.pools["any"].busy) == 2
    # They step together: the short prompt waits for the long one.
    served, _ = serve(wide, setting(), [Request(0, 0.0, 8, 1), Request(1, 0.0, 80, 1)])
    assert [one.first_token for one in served] == [11.0, 11.0]


def test_what_either_side_has_is_not_computed_or_pulled() -> None:
    # 64 tokens of which 48 are the same; a block is 16.
    requests = [Request(n, 50.0 * n, 64, 2, prefix=(7, 7, 7, n), block=16) for n in range(3)]
    served, run = serve(PD, setting(prefix_caching=True), requests)
    assert [one.cached for one in served] == [0, 48, 48]
    assert [one.prefilled - one.prefill_start for one in served] == [9.0, 3.0, 3.0]
    assert run.pools["decode"].transfer_bytes == (4 + 1 + 1) * 16 * 131072
    assert served[1].transferred - served[1].transfer_start == pytest.approx(pull_seconds(1))
    # Decode computes one token of each, whatever it had.
    assert served[1].first_token == pytest.approx(served[1].transferred + 1.0)


def test_scheduling_ahead_leaves_the_pull_to_the_next_decision() -> None:
    ahead = setting(async_scheduling=True, by_length=True)
    first, second = serve(PD, ahead, [Request(0, 0.0, 8, 30), Request(1, 5.0, 8, 2)])[0]
    pull = pull_seconds(1)
    # Decode's steps end at 2 + pull + 1, 2 + ... The second prompt is there at 7.0, in the step that ends at 7 + pull;
    # the step after it was decided on when this one began, so the pull begins then and the job runs two steps later.
    assert second.prefilled == 7.0
    assert second.transfer_start == pytest.approx(7.0 + pull)
    assert second.transferred == pytest.approx(7.0 + 2 * pull)
    assert second.decode_start == pytest.approx(8.0 + pull)
    assert second.first_token == pytest.approx(10.0 + pull)
    assert first.last_token == pytest.approx(32.0 + pull)


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


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(SimulationError, match="request 0 needs 1000 tokens of cache"):
        serve(plan(prefill={"kv_blocks": 10}, decode={}), setting(), [Request(0, 0.0, 1000, 2)])
    with pytest.raises(SimulationError, match="sort them by arrival"):
        serve(PD, setting(), [Request(0, 1.0, 8, 2), Request(1, 0.0, 8, 2)])
    whole = Setting(MODEL, QUANT, CLUSTER, lambda pool: SOURCE, utilisation=0.1)
    with pytest.raises(PlanError, match=r"pool 1 any: .* does not fit"):
        serve(plan(any={"kv_blocks": None}), whole, [Request(0, 0.0, 8, 2)])


def test_one_pool_is_served_by_whoever_has_least_to_do() -> None:
    two = plan(any={"count": 2})
    served, run = serve(two, setting(serving=ALL_DISAGGREGATED), [Request(n, 0.0, 8, 2) for n in range(4)])
    assert [one.first_token for one in served] == [3.0] * 4
    assert run.pools["any"].steps == (2, 2)
