"""Simulated encode pools: schedules by hand, the router's rules, the token cache, and what is conserved."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from fleets import ALL_DISAGGREGATED, CLUSTER, MODEL, Watch, plan, poisson, serve, setting
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import ExactSource

from vllm_suite.planner.plan import PlanError, PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.encode_stage import EncodeStage, Spread, slices
from vllm_suite.planner.simulator.encoders import Encoder
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.handover import Place
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.simulator.token_cache import TokenCache
from vllm_suite.planner.sources.transfers import Transfers
from vllm_suite.planner.workload import Item, Request
from vllm_suite.router.encode import config, slicing, spread

PICTURE = Item("picture", 64)
ROW = MODEL.hidden * 2


def encoding(serving: Serving = ALL_DISAGGREGATED, seconds: float = 0.5) -> Setting:
    return replace(setting(serving=serving), encode_seconds=lambda pool, item: seconds * item.tokens / 64)


def moved(tokens: int) -> float:
    return Transfers(CLUSTER).seconds(tokens * ROW, range(0, 1), range(1, 2))


def test_a_request_is_encoded_fetched_prefilled_and_decoded() -> None:
    epd = plan(encode={}, prefill={}, decode={})
    (one,), run = serve(epd, encoding(), [Request(0, 1.0, 80, 2, items=(PICTURE,))])
    assert (one.encode_start, one.encoded) == (1.0, 1.5)
    assert one.fetched == one.prefill_start == pytest.approx(1.5 + moved(64))
    # 80 tokens of a prompt, the picture's among them: 11 s.
    assert one.prefilled == pytest.approx(one.fetched + 11.0)
    assert one.queue_s == pytest.approx(0.0, abs=1e-12)
    assert (run.pools["encode"].busy, run.pools["encode"].encoded) == ((0.5,), 1)
    assert (run.pools["prefill"].transfers, run.pools["prefill"].transfer_bytes) == (1, 64 * ROW)


def test_text_passes_by() -> None:
    epd = plan(encode={}, prefill={}, decode={})
    _, text = serve(epd, encoding(), [Request(0, 0.0, 80, 2, items=(PICTURE,)), Request(1, 0.0, 80, 2)])[0]
    assert (text.prefill_start, math.isnan(text.encoded)) == (0.0, True)


@pytest.mark.parametrize(("encoders", "seconds"), [(1, 2.0), (2, 1.0), (3, 1.0), (4, 0.5), (8, 0.5)])
def test_the_items_of_a_request_are_encoded_side_by_side(encoders: int, seconds: float) -> None:
    epd = plan(encode={"count": encoders}, any={})
    for policy in ("cache_affinity", "least_encode_tokens"):
        serving = Serving(encode_policy=policy)  # type: ignore[arg-type]
        (one,), run = serve(epd, encoding(serving), [Request(0, 0.0, 300, 2, items=(PICTURE,) * 4)])
        assert one.encoded == seconds
        assert sum(run.pools["encode"].steps) == 4


def test_outputs_of_a_batch_come_together() -> None:
    epd = plan(encode={"max_items": 2}, any={})
    requests = [Request(n, 0.0, 80, 1, items=(PICTURE,)) for n in range(3)]
    served, run = serve(epd, encoding(), requests)
    assert [one.encoded for one in served] == [1.0, 1.0, 1.5]
    assert [one.encode_start for one in served] == [0.0, 0.0, 1.0]
    assert (run.pools["encode"].steps, run.pools["encode"].waited) == ((2,), 1.0)


def test_an_item_of_pieces_is_cut() -> None:
    film = Item("film", 2048, pieces=8)
    epd = plan(encode={"count": 4}, any={})
    (one,), run = serve(epd, encoding(), [Request(0, 0.0, 2100, 1, items=(film,))])
    # 16 s on one encoder; 2048 rows make four slices of 512.
    assert one.encoded == 4.0
    assert run.pools["encode"].steps == (1, 1, 1, 1)
    assert run.pools["any"].transfer_bytes == 2048 * ROW
    (one,), _ = serve(epd, encoding(), [Request(0, 0.0, 2100, 1, items=(replace(film, pieces=1),))])
    assert one.encoded == 16.0


def test_equal_content_is_encoded_once() -> None:
    same = Item("picture", 64, content=7)
    epd = plan(encode={"count": 2}, any={})
    requests = [
        Request(0, 0.0, 200, 1, items=(same, same)),
        Request(1, 0.25, 80, 1, items=(same,)),
        Request(2, 9.0, 80, 1, items=(same,)),
    ]
    served, run = serve(epd, encoding(), requests)
    assert [(one.encode_start, one.encoded) for one in served] == [(0.0, 0.5), (0.0, 0.5), (9.0, 9.0)]
    encode = run.pools["encode"]
    assert (encode.encoded, encode.hits) == (1, 1)
    assert run.pools["any"].transfers == 3
    assert served[2].fetched == pytest.approx(9.0 + moved(64))


def test_the_token_cache_lets_the_least_recently_used_go() -> None:
    # Room for two pictures. The first is used again before the third comes, so the second goes.
    serving = Serving(encode_pool_bytes=2 * 64 * ROW)
    order = [0, 1, 0, 2, 0, 1]
    requests = [
        Request(n, 10.0 * n, 80, 1, items=(Item("picture", 64, content=content),)) for n, content in enumerate(order)
    ]
    served, run = serve(plan(encode={}, any={}), encoding(serving), requests)
    assert [one.encoded - one.arrival for one in served] == [0.5, 0.5, 0.0, 0.5, 0.0, 0.5]
    assert (run.pools["encode"].hits, run.pools["encode"].overflow) == (2, 0)


def test_what_is_waited_for_makes_no_room() -> None:
    # The second output comes while the first is still being fetched, and there is room for one.
    serving = Serving(encode_pool_bytes=64 * ROW)
    requests = [Request(n, 0.0, 80, 1, items=(Item("picture", 64, content=n),)) for n in range(2)]
    served, run = serve(plan(encode={"max_items": 2}, any={}), encoding(serving), requests)
    assert run.pools["encode"].overflow == 1
    assert all(one.fetched == one.fetched for one in served)


def test_without_encoders_prefill_encodes_in_its_step() -> None:
    (one,), run = serve(plan(prefill={}, decode={}), encoding(), [Request(0, 0.0, 128, 2, items=(PICTURE, PICTURE))])
    # 17 s of prompt and twice half a second.
    assert (one.prefill_start, one.prefilled) == (0.0, 18.0)
    assert math.isnan(one.encoded)
    # In chunks of 100 tokens the second picture begins in the first chunk; both are encoded there.
    small = plan(any={"max_num_batched_tokens": 60, "max_num_seqs": 4})
    (one,), _ = serve(small, encoding(), [Request(0, 0.0, 128, 1, items=(PICTURE, PICTURE))])
    assert one.prefilled == 3 + 128 / 8 + 1.0
    assert run.pools["decode"].transfers == 1


def test_an_own_encoder_knows_what_it_has_seen() -> None:
    same = Item("picture", 64, content=7)
    served, _ = serve(plan(any={}), encoding(), [Request(n, 20.0 * n, 64, 1, items=(same,)) for n in range(2)])
    assert [one.ttft for one in served] == [9.5, 9.0]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(PlanError, match="pool 1 encode: the setting has no `encode_seconds`"):
        serve(plan(encode={}, any={}), setting(), [Request(0, 0.0, 80, 1)])
    with pytest.raises(SimulationError, match="request 0 has items"):
        serve(plan(any={}), setting(), [Request(0, 0.0, 80, 1, items=(PICTURE,))])


# The router's rules


def encoders(loads: list[int]) -> list[Encoder]:
    found = [Encoder("encode", Place(index, index, PoolPlan("encode", 1))) for index in range(len(loads))]
    for encoder, load in zip(found, loads, strict=True):
        encoder.tokens = load
    return found


loads = st.lists(st.integers(0, 4000), min_size=1, max_size=6)


@given(loads, st.lists(st.integers(1, 6000), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_items_are_cut_as_the_router_cuts_them(load: list[int], tokens: list[int]) -> None:
    members: Any = [SimpleNamespace(encode_tokens=each, slices=lambda modality: True) for each in load]
    theirs: Any = [SimpleNamespace(tokens=each, modality="video") for each in tokens]
    items = [Item("film", each, pieces=64) for each in tokens]
    assert slices(items, encoders(load), Serving()) == slicing.counts(theirs, members, config.Slices())


@given(st.lists(st.tuples(loads.filter(lambda each: len(each) == 3), st.lists(st.integers(1, 900), min_size=1))))
@settings(max_examples=100, deadline=None)
def test_items_are_dealt_as_the_router_deals_them(calls: list[tuple[list[int], list[int]]]) -> None:
    ours = Spread(Serving(encode_policy="least_encode_tokens"))
    router = spread.LeastEncodeTokens(config.Encode())
    for load, tokens in calls:
        members: Any = [SimpleNamespace(encode_tokens=each, name=index) for index, each in enumerate(load)]
        theirs: Any = [SimpleNamespace(tokens=each) for each in tokens]
        expected = [order[0].name for order in router.order(theirs, members)]  # type: ignore[attr-defined]
        chosen = ours.deal(list(enumerate(tokens)), encoders(load))
        assert [encoder.place.number for encoder in chosen] == expected


@given(loads, st.lists(st.tuples(st.integers(0, 50), st.integers(1, 900)), min_size=1, max_size=10))
@settings(max_examples=100, deadline=None)
def test_affinity_follows_content_within_the_bound(load: list[int], pieces: list[tuple[int, int]]) -> None:
    # The router's hash of a name is not ours, so its rules are compared and not its choices.
    chosen = Spread(Serving()).deal(pieces, encoders(load))
    after, total = list(load), sum(load) + sum(tokens for _, tokens in pieces)
    bound = 1.1 * total / len(load)
    for (_, tokens), encoder in sorted(zip(pieces, chosen, strict=True), key=lambda pair: -pair[0][1]):
        before = after[encoder.place.number]
        assert before + tokens <= max(bound, tokens) or before == min(after)
        after[encoder.place.number] += tokens


def test_affinity_is_stable_and_spreads() -> None:
    idle = encoders([0] * 4)
    once = [Spread(Serving()).deal([(content, 10)], idle)[0].place.number for content in range(400)]
    again = [Spread(Serving()).deal([(content, 10)], idle)[0].place.number for content in range(400)]
    assert once == again
    assert all(70 < once.count(number) < 130 for number in range(4))


@given(st.data(), st.integers(0, 1000), st.sampled_from(["any", "pd"]), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost(data: st.DataObject, seed: int, shape: str, count: int, batch: int) -> None:
    draw, now, requests = random.Random(seed), 0.0, list[Request]()
    for number in range(30):
        now += draw.choice([0.0, 0.25, 6.0])
        items = tuple(
            Item(
                "picture",
                draw.choice([16, 64, 1100]),
                content=draw.choice([None, *range(5)]),
                pieces=draw.choice([1, 4]),
            )
            for _ in range(draw.randrange(4))
        )
        requests.append(
            Request(number, now, sum(item.tokens for item in items) + draw.randrange(1, 40), 3, items=items)
        )
    serving = Serving(
        min_prompt_tokens=0,
        encode_policy=data.draw(st.sampled_from(["cache_affinity", "least_encode_tokens"])),
        encode_pool_bytes=data.draw(st.sampled_from([0.0, 100 * ROW, 3000 * ROW])),
        hop_s=data.draw(st.sampled_from([0.0, 0.5])),
        overlap=data.draw(st.sampled_from(["auto", "always", "never"])),
    )
    pools: dict[str, dict[str, Any]] = {"any": {}} if shape == "any" else {"prefill": {}, "decode": {}}
    watch = Watch()
    served, run = serve(
        plan(encode={"count": count, "max_items": batch}, **pools), encoding(serving), requests, observer=watch
    )
    assert [one.number for one in served] == list(range(30))
    assert watch.empty()
    for one, request in zip(served, requests, strict=True):
        if request.items:
            assert one.arrival <= one.encoded <= one.fetched <= one.prefilled
            assert serving.overlap != "never" or one.fetched <= one.prefill_start
            assert one.encode_start <= one.encoded
        else:
            assert math.isnan(one.fetched)
        assert -1e-9 <= one.queue_s <= one.latency
    encode = run.pools["encode"]
    assert sum(encode.busy) <= count * run.end + 1e-9
    assert encode.encoded >= len({item.content for one in requests for item in one.items if item.content is not None})


def test_the_cache_forgets_what_it_keeps_no_more() -> None:
    clock = Clock()
    members = list[Encoder]()
    stage = EncodeStage(members, Serving(encode_policy="least_encode_tokens"), lambda item: 1.0, 1.0)
    members.append(
        Encoder(
            "encode",
            Place(0, 0, PoolPlan("encode", 1)),
            clock=clock,
            ended=stage.ended,
            cache=TokenCache(200.0, stage.dropped),
        )
    )
    for _ in range(50):
        stage.fetched(_admitted(stage, clock))
    assert len(stage._known) == 3
    assert members[0].cache.size == 192.0
    assert members[0].drained


def _admitted(stage: EncodeStage, clock: Clock) -> Any:
    waiter = stage.admit([PICTURE], clock.now, lambda then: None)
    clock.run()
    return waiter


def test_a_pool_of_encoders_is_an_m_d_1_queue() -> None:
    waited, count, rate = 0.0, 12_000, 1.0

    def sink(served: Served) -> None:
        nonlocal waited
        waited += served.encoded - served.arrival

    of = replace(encoding(), source=lambda pool: ExactSource(0.001, 0.0))
    simulate_plan(plan(encode={}, any={}), of, poisson(count, rate, 64, 1, seed=5, items=(PICTURE,)), sink)
    assert waited / count == pytest.approx(0.5 + rate * 0.25 / (2 * 0.5), rel=0.03)
