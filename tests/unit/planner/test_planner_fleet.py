"""Simulated fleets of prefill and decode pools: schedules by hand, and what is refused."""

from __future__ import annotations

import math

import pytest
from fleets import (
    ALL_DISAGGREGATED,
    CLUSTER,
    MODEL,
    QUANT,
    SOURCE,
    Watch,
    plan,
    pull_seconds,
    serve,
    setting,
)
from simulated import ExactSource

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.order import LengthOrder
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.simulator.step_sources import LastTokens
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.workload import Request

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


def test_a_plan_has_one_pool_of_a_role() -> None:
    with pytest.raises(PlanError, match="two pools of one role: prefill, prefill, decode; a role has one pool"):
        Plan((PoolPlan("prefill", 1), PoolPlan("prefill", 2), PoolPlan("decode", 1)))
