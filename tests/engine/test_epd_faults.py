"""What goes wrong between an encoder and its consumer, on real engines. A fault costs its item, nothing else."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from epd_engine import Ask, EpdEngine, Spec, engines, until
from epd_lies import WRONG_ANSWERS, WRONG_REFERENCES, Fault, changed
from epd_stage import (
    SUITE,
    Stage,
    abort_at_once,
    abort_pending,
    encode_to,
    exchange,
    flip,
    lie,
    lose_next_load,
    named,
    new_uuid,
    open_state,
    pending,
    picture,
    poison,
    question,
    set_key,
    set_on_failure,
    shorten,
    strike,
    waiting_claims,
)

from vllm_suite.fleet.pictures_parts import text_part
from vllm_suite.fleet.tiny_media import write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("qwen2_5_vl", tmp_path_factory.mktemp("media") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def shared_stage(model: Path) -> Iterator[Stage]:
    with engines(Spec("e", model, "e", suite=SUITE), Spec("pd", model, "pd", suite=SUITE)) as (e, pd):
        yield Stage(e, pd)


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """Both engines; after the test the consumer keeps nothing of its requests."""
    yield shared_stage
    until(lambda: not any(shared_stage.pd.call(open_state).values()), 10)


@pytest.fixture
def encoder(model: Path) -> Iterator[Callable[..., EpdEngine]]:
    """Makes encoders that the test may kill."""
    started: list[EpdEngine] = []

    def make(**options: Any) -> EpdEngine:
        started.append(EpdEngine(Spec(options.pop("name", "e2"), model, "e", suite=SUITE, **options)))
        started[-1].wait_ready()
        return started[-1]

    yield make
    for engine in started:
        engine.close()


# --- references ---


def test_an_item_without_pixels_that_nobody_knows(stage: Stage) -> None:
    before = stage.totals("no_reference")["failed_items"]
    for ec in (None, {}, {"other": {"suite": {}}}, {"": 3}):
        answer = stage.batch(question(named(new_uuid())), ec)
        assert answer.finish_reason == "error"
    assert stage.totals("no_reference")["failed_items"] == before + 4
    stage.healthy()


@pytest.mark.parametrize(("fault", "reason"), WRONG_REFERENCES)
def test_a_reference_that_is_not_what_was_issued(stage: Stage, fault: Fault, reason: str) -> None:
    stage.refused(fault, reason)


def test_a_reference_for_another_item(stage: Stage) -> None:
    other, its = stage.encoded(5)

    stage.refused(lambda uuid, ec: {uuid: its[other]}, "foreign_content")


def test_a_reference_without_the_fleets_signature(stage: Stage) -> None:
    stage.pd.call(set_key, b"secret")
    try:
        uuid, ec = stage.encoded(3)
        before = stage.totals("bad_signature")
        assert stage.batch(question(named(uuid)), ec).finish_reason == "error"
        assert stage.totals("bad_signature")["refused"] == before["refused"] + 1
        uuid = new_uuid()
        assert stage.batch(question(named(uuid)), pending(uuid, stage.where())).finish_reason == "error"
        assert stage.totals("bad_signature")["refused"] == before["refused"] + 2
    finally:
        stage.pd.call(set_key, None)
    stage.healthy()


def test_an_item_of_another_size_under_the_same_name(stage: Stage) -> None:
    for seed, made, asked, reason in ((3, 56, 112, "truncated"), (3, 224, 112, "wrong_shape")):
        uuid = new_uuid()
        ec = stage.e.encode([picture(uuid, seed, made)])
        before = stage.totals(reason)
        assert stage.batch(question(picture(uuid, seed, asked)), ec).said() == stage.expected(seed).said()
        assert stage.totals(reason)["refused"] == before["refused"] + 1
    stage.healthy()


def test_numbers_that_no_processor_makes(stage: Stage) -> None:
    before = stage.totals("malformed")["failed_items"]
    for grid in ([1.0, 8.0, 8.0], [8, 8]):
        uuid, ec = stage.encoded(3)
        assert stage.batch(question(named(uuid, grid)), ec).finish_reason == "error"
    assert stage.totals("malformed")["failed_items"] == before + 2
    stage.healthy()


# --- items ---


@pytest.mark.parametrize(("changes", "reason"), WRONG_ANSWERS)
def test_a_producer_that_says_something_else_than_it_has(stage: Stage, changes: dict[str, Any], reason: str) -> None:
    def fault(uuid: str, ec: dict[str, Any]) -> dict[str, Any]:
        stage.e.call(lie, uuid, changes)
        return ec

    stage.refused(fault, reason)


def test_an_item_that_was_cut_short(stage: Stage) -> None:
    def fault(uuid: str, ec: dict[str, Any]) -> dict[str, Any]:
        stage.e.call(shorten, uuid)
        return ec

    stage.refused(fault, "truncated")


def test_one_bit_of_the_producers_memory(stage: Stage) -> None:
    def fault(uuid: str, ec: dict[str, Any]) -> dict[str, Any]:
        stage.e.call(flip, uuid)
        return ec

    stage.refused(fault, "bad_checksum")


def test_a_wrong_item_of_the_right_shape(stage: Stage) -> None:
    other, _ = stage.encoded(6)

    def fault(uuid: str, ec: dict[str, Any]) -> dict[str, Any]:
        stage.e.call(exchange, uuid, other)
        return ec

    stage.refused(fault, "bad_checksum")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_on_arrival(stage: Stage, value: float) -> None:
    def fault(uuid: str, ec: dict[str, Any]) -> dict[str, Any]:
        stage.e.call(poison, uuid, value)
        return ec

    stage.refused(fault, "non_finite")
    text = [text_part("Tell me about the weather in the mountains, in a few words.")]
    answers = stage.pd.ask_many([Ask(text) for _ in range(20)])
    assert {str(answer.said()) for answer in answers} == {str(answers[0].said())}
    stage.healthy()


def test_values_that_are_no_numbers_at_the_encoder(stage: Stage) -> None:
    stage.e.call(encode_to, float("nan"))
    try:
        uuid = new_uuid()
        ec = stage.e.encode([picture(uuid, 3)])
        assert ec[uuid]["suite_error"] == "non_finite"
        assert "suite" not in ec[uuid]
    finally:
        stage.e.call(encode_to, 0.0)
    before = stage.totals("non_finite")
    assert stage.batch(question(picture(uuid, 3)), ec).said() == stage.expected(3).said()
    assert stage.totals("non_finite")["local_encodes"] == before["local_encodes"] + 1
    assert stage.e.metric("vllm_suite_ec_not_stored_total", reason="non_finite") >= 1
    stage.healthy()


def test_pools_that_are_too_small(stage: Stage) -> None:
    size = 672  # 576 rows, 288 KB: more than the receive pool, less than the producer's
    uuid = new_uuid()
    ec = stage.e.encode([picture(uuid, 3, size)])
    assert "suite" in ec[uuid]
    before = stage.totals("too_large")
    stage.batch(question(picture(uuid, 3, size)), ec)
    assert stage.totals("too_large")["local_encodes"] == before["local_encodes"] + 1
    assert stage.totals("too_large")["refused"] == before["refused"] + 1
    stage.healthy()


def test_a_producers_pool_that_is_full(encoder: Callable[..., EpdEngine], stage: Stage) -> None:
    e = encoder()
    kept, lost = {}, {}
    for seed in range(40):  # 73 KB each, all leased
        uuid = new_uuid()
        entry = e.encode([picture(uuid, seed, 336)])[uuid]
        (kept if "suite" in entry else lost)[uuid] = entry
        if len(lost) == 2:
            break
    assert len(kept) >= 10
    assert {entry["suite_error"] for entry in lost.values()} == {"not_stored"}
    before = stage.totals("not_stored")["local_encodes"]
    (uuid, entry), *_ = lost.items()
    stage.batch(question(picture(uuid, 3, 336)), {uuid: entry})
    assert stage.totals("not_stored")["local_encodes"] == before + 1
    # What was leased is still there.
    (uuid, entry), *_ = kept.items()
    loads = stage.counter("loads")
    stage.batch(question(picture(uuid, 0, 336)), {uuid: entry})
    assert stage.counter("loads") == loads + 1


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a\\..\\b", "ü" * 40, "%00", "name with spaces"])
def test_names_that_clients_choose(stage: Stage, name: str) -> None:
    uuid = name + new_uuid()
    _, ec = stage.encoded(3, uuid)
    loads = stage.counter("loads")
    assert stage.batch(question(named(uuid)), ec).said() == stage.expected(3).said()
    assert stage.counter("loads") == loads + 1


def test_names_that_no_instance_passes_on(stage: Stage) -> None:
    for name in ("x" * 5000, "line\nbreak"):
        uuid = name + new_uuid()
        _, ec = stage.encoded(3, uuid)
        assert ec[uuid]["suite_error"] == "not_stored"
        assert stage.batch(question(picture(uuid, 3)), ec).said() == stage.expected(3).said()
        assert stage.batch(question(named(uuid + "1")), {uuid + "1": ec[uuid]}).finish_reason == "error"
    stage.healthy()


# --- producers that go away ---


def test_a_producer_that_is_dead(encoder: Callable[..., EpdEngine], stage: Stage) -> None:
    e = encoder()
    uuids = [new_uuid() for _ in range(4)]
    ec = e.encode([picture(uuid, seed) for seed, uuid in enumerate(uuids)])
    before = stage.totals("peer_dead")
    assert stage.batch(question(named(uuids[0])), ec).said() == stage.expected(0).said()
    e.close()
    assert stage.batch(question(named(uuids[0])), ec).said() == stage.expected(0).said()  # in vLLM's cache by now
    for seed in (1, 2):
        assert stage.batch(question(picture(uuids[seed], seed)), ec).said() == stage.expected(seed).said()
    assert stage.batch(question(named(uuids[3])), ec).finish_reason == "error"
    change = {name: value - before[name] for name, value in stage.totals("peer_dead").items()}
    assert change == {"refused": 3, "local_encodes": 2, "failed_items": 1, "loads": 1}
    stage.healthy()


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGSTOP])
def test_a_producer_that_goes_away_while_it_is_read(
    encoder: Callable[..., EpdEngine], stage: Stage, sig: signal.Signals
) -> None:
    e = encoder()
    uuid, other = new_uuid(), new_uuid()
    ec = e.encode([picture(uuid, 2), picture(other, 3)])
    assert e.process.pid is not None
    stage.pd.call(strike, e.process.pid, int(sig))
    before = stage.totals("read_failed")
    assert stage.batch(question(picture(uuid, 2)), ec).said() == stage.expected(2).said()
    change = {name: value - before[name] for name, value in stage.totals("read_failed").items()}
    assert change == {"refused": 1, "local_encodes": 1, "failed_items": 0, "loads": 0}
    if sig == signal.SIGSTOP:
        os.kill(e.process.pid, signal.SIGCONT)
        until(lambda: stage.batch(question(picture(other, 3)), ec).said() == stage.expected(3).said())
    stage.healthy()


def test_a_producer_that_is_stopped(encoder: Callable[..., EpdEngine], stage: Stage) -> None:
    e = encoder()
    uuids = [new_uuid() for _ in range(3)]
    ec = e.encode([picture(uuid, seed) for seed, uuid in enumerate(uuids)])
    e.kill(signal.SIGSTOP)
    asked, dead = stage.totals("claim_timeout"), stage.totals("peer_dead")
    for seed in (0, 1):
        assert stage.batch(question(picture(uuids[seed], seed)), ec).said() == stage.expected(seed).said()
    assert stage.totals("claim_timeout")["refused"] - asked["refused"] >= 1
    both = stage.totals("claim_timeout")["refused"] + stage.totals("peer_dead")["refused"]
    assert both - asked["refused"] - dead["refused"] == 2
    e.kill(signal.SIGCONT)
    loads = stage.counter("loads")

    def fetched() -> bool:
        uuid = new_uuid()
        again = e.encode([picture(uuid, 2)])
        stage.batch(question(picture(uuid, 2)), again)
        return stage.counter("loads") == loads + 1

    until(fetched)


def test_a_producer_that_was_restarted_on_its_port(encoder: Callable[..., EpdEngine], stage: Stage) -> None:
    e = encoder()
    uuid, other = new_uuid(), new_uuid()
    old = e.encode([picture(uuid, 2), picture(other, 3)])
    e.close()
    again = encoder(env={"VLLM_EC_SIDE_CHANNEL_PORT": str(e.ec_port)})
    new = again.encode([picture(uuid, 2), picture(other, 3)])
    assert old[uuid]["suite"]["claim_port"] == new[uuid]["suite"]["claim_port"]
    before = stage.totals("stale_epoch")
    assert stage.batch(question(named(uuid)), old).finish_reason == "error"
    assert stage.batch(question(picture(other, 3)), old).said() == stage.expected(3).said()
    change = {name: value - before[name] for name, value in stage.totals("stale_epoch").items()}
    assert change == {"refused": 2, "local_encodes": 1, "failed_items": 1, "loads": 0}
    assert stage.batch(question(named(uuid)), new).said() == stage.expected(2).said()


# --- items under way ---


def test_an_item_that_never_comes(stage: Stage) -> None:
    place = stage.where()
    before = stage.totals("claim_timeout")
    uuid = new_uuid()
    answer = stage.batch(question(picture(uuid, 3)), pending(uuid, place, wait_s=1.0))
    assert answer.said() == stage.expected(3).said()
    uuid = new_uuid()
    assert stage.batch(question(named(uuid)), pending(uuid, place, wait_s=1.0)).finish_reason == "error"
    change = {name: value - before[name] for name, value in stage.totals("claim_timeout").items()}
    assert change == {"refused": 2, "local_encodes": 1, "failed_items": 1, "loads": 0}


def test_the_first_encoder_dies_and_the_second_delivers(encoder: Callable[..., EpdEngine], stage: Stage) -> None:
    e = encoder()
    ref = e.encode([picture("s-first", 1)])["s-first"]["suite"]
    second = stage.where()
    first = type(second)(ref["producer"], ref["epoch"], ref["claim_host"], ref["claim_port"])
    uuid, expected, loads = new_uuid(), stage.expected(5), stage.counter("loads")
    stage.pd.send("ask", stage.asks(question(named(uuid)), pending(uuid, first, second)))
    until(lambda: e.call(waiting_claims) == 1)
    e.close()
    until(lambda: stage.e.call(waiting_claims) == 1)
    stage.e.encode([picture(uuid, 5)])
    assert stage.check(*stage.pd.receive()).said() == expected.said()
    assert stage.counter("loads") == loads + 1


def test_a_request_that_is_aborted_while_its_item_is_under_way(stage: Stage) -> None:
    uuid, place = new_uuid(), stage.where()
    said = stage.pd.call(abort_pending, question(named(uuid)), pending(uuid, place))
    assert (said["attempts"], said["attempts after"]) == (1, 0)
    # Meanwhile the engine may sleep until the item comes: a worker spins for a second after each step.
    assert said["held"] == 1
    assert said["wait"] > 5
    assert 0 < said["wait beside others"] < 0.1
    assert said["wait after"] == math.inf
    stage.healthy()


def test_a_consumer_that_may_not_encode(stage: Stage) -> None:
    stage.pd.call(set_on_failure, "fail")
    try:
        uuid, ec = stage.encoded(3)
        before = stage.totals("stale_epoch")
        answer = stage.batch(question(picture(uuid, 3)), changed(epoch="0" * 16)(uuid, ec))
        assert answer.finish_reason == "error"
        change = {name: value - before[name] for name, value in stage.totals("stale_epoch").items()}
        assert change == {"refused": 1, "local_encodes": 0, "failed_items": 1, "loads": 0}
    finally:
        stage.pd.call(set_on_failure, "encode")
    stage.healthy()


def test_an_item_that_is_lost_between_its_arrival_and_its_use(stage: Stage) -> None:
    uuid, ec = stage.encoded(3)
    before = stage.counter("contained_faults", fault="lost_load")
    stage.pd.call(lose_next_load)
    assert stage.batch(question(picture(uuid, 3)), ec).finish_reason == "error"
    assert stage.counter("contained_faults", fault="lost_load") == before + 1
    # What stood in its place is not used by the next request for it.
    assert stage.batch(question(picture(uuid, 3)), ec).said() == stage.expected(3).said()
    stage.healthy()


def test_an_encoder_whose_request_was_given_up(stage: Stage) -> None:
    uuid, place = new_uuid(), stage.where()
    before = stage.totals("not_stored")
    expected = stage.expected(5)
    stage.pd.send("ask", stage.asks(question(picture(uuid, 5)), pending(uuid, place)))
    until(lambda: stage.e.call(waiting_claims) == 1)
    stage.e.call(abort_at_once, [picture(uuid, 5)])
    assert stage.check(*stage.pd.receive()).said() == expected.said()
    assert stage.totals("not_stored")["local_encodes"] == before["local_encodes"] + 1


def test_one_fetch_for_an_item_that_several_requests_want(stage: Stage) -> None:
    uuid, place = new_uuid(), stage.where()
    fetches, expected = stage.counter("fetches", outcome="ok"), stage.expected(5)
    asks = [Ask(question(named(uuid)), ec=pending(uuid, place)) for _ in range(4)]
    stage.pd.send("ask", asks)
    until(lambda: stage.e.call(waiting_claims) == 1)
    stage.e.encode([picture(uuid, 5)])
    assert {str(answer.said()) for answer in stage.pd.receive()} == {str(expected.said())}
    assert stage.counter("fetches", outcome="ok") == fetches + 1
