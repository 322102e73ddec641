"""Prefill beside encoding, on real engines: what is computed while items are under way, and what is not fetched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from epd_engine import Spec, engines, until
from epd_stage import (
    SUITE,
    Stage,
    named,
    new_uuid,
    open_state,
    pending,
    picture,
    question,
    record_steps,
    reset_encoder_cache,
    steps,
    waiting_claims,
)

from vllm_suite.fleet.pictures_parts import Part, text_part
from vllm_suite.fleet.tiny_media import write

BEFORE, BETWEEN, AFTER = text_part("Before it. " * 8), text_part("Between. " * 8), text_part("After it. " * 8)


@pytest.fixture(scope="module")
def shared_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    model = write("qwen2_5_vl", tmp_path_factory.mktemp("media") / "qwen2_5_vl")
    e, pd = Spec("e", model, "e", suite=SUITE), Spec("pd", model, "pd", suite=SUITE, prefix_caching=True)
    with engines(e, pd) as (encoder, consumer):
        yield Stage(encoder, consumer)


@pytest.fixture
def stage(shared_stage: Stage) -> Iterator[Stage]:
    """Both engines; after the test the consumer keeps nothing of its requests."""
    yield shared_stage
    until(lambda: not any(shared_stage.pd.call(open_state).values()), 10)


def two(uuids: list[str], seeds: tuple[int, int] = (5, 6)) -> list[Part]:
    return [BEFORE, picture(uuids[0], seeds[0]), BETWEEN, picture(uuids[1], seeds[1]), AFTER]


def ask_under_way(stage: Stage, parts: list[Part], ec: dict[str, Any], waiting: int) -> None:
    """Send a request and wait until its items are asked for."""
    from epd_engine import Ask

    stage.pd.call(record_steps)
    stage.pd.send("ask", [Ask(parts, ec=ec)])
    until(lambda: stage.e.call(waiting_claims) == waiting)


def test_the_text_before_an_item_is_computed_while_it_is_encoded(stage: Stage) -> None:
    uuid, place = new_uuid(), stage.where()
    expected = stage.pd.ask([BEFORE, picture(new_uuid(), 5), AFTER])
    cuts = stage.counter("cut_chunks")
    ask_under_way(stage, [BEFORE, picture(uuid, 5), AFTER], pending(uuid, place), 1)
    stage.e.encode([picture(uuid, 5)])
    (answer,) = stage.pd.receive()
    assert answer.said() == expected.said()
    seen = stage.pd.call(steps)
    ((item,),) = seen.items.values()
    # The text before it may be in the prefix cache already; the chunk ends just before the item all the same.
    ends = [end + answer.cached_tokens for end in seen.boundaries(answer.prompt_tokens - answer.cached_tokens)]
    assert ends == [item, answer.prompt_tokens]
    assert stage.counter("cut_chunks") > cuts


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_items_under_way_come_in_either_order(stage: Stage, order: tuple[int, int]) -> None:
    uuids, place = [new_uuid(), new_uuid()], stage.where()
    expected = stage.pd.ask(two([new_uuid(), new_uuid()]))
    ask_under_way(stage, two(uuids), pending(uuids[0], place) | pending(uuids[1], place), 2)
    for left, index in enumerate(order):
        stage.e.encode([picture(uuids[index], 5 + index)])
        until(lambda left=left: stage.e.call(waiting_claims) == 1 - left)
    (answer,) = stage.pd.receive()
    assert answer.said() == expected.said()
    seen = stage.pd.call(steps)
    ((first, second),) = seen.items.values()
    ends = [end + answer.cached_tokens for end in seen.boundaries(answer.prompt_tokens - answer.cached_tokens)]
    assert ends[0] == first
    assert ends[-1] == answer.prompt_tokens
    assert set(ends) <= {first, second, answer.prompt_tokens}


def test_one_item_there_and_one_under_way(stage: Stage) -> None:
    uuids, place = [new_uuid(), new_uuid()], stage.where()
    expected = stage.pd.ask(two([new_uuid(), new_uuid()]))
    _, ec = stage.encoded(5, uuids[0])
    ask_under_way(stage, two(uuids), ec | pending(uuids[1], place), 1)
    stage.e.encode([picture(uuids[1], 6)])
    (answer,) = stage.pd.receive()
    assert answer.said() == expected.said()
    seen = stage.pd.call(steps)
    ((_, second),) = seen.items.values()
    ends = [end + answer.cached_tokens for end in seen.boundaries(answer.prompt_tokens - answer.cached_tokens)]
    assert second in ends


def test_a_request_that_names_no_source_does_not_wait_for_anothers(stage: Stage) -> None:
    """It has the pixels: the item is encoded here, and then nobody waits any more."""
    from epd_engine import Ask

    uuid, place, expected = new_uuid(), stage.where(), stage.expected(5)
    asks = [Ask(question(picture(uuid, 5)), ec=pending(uuid, place)), Ask(question(picture(uuid, 5)))]
    with stage.pd.encodes(1):
        assert {str(answer.said()) for answer in stage.pd.ask_many(asks)} == {str(expected.said())}


def test_an_image_twice_in_a_request_is_fetched_once(stage: Stage) -> None:
    uuid, ec = stage.encoded(5)
    other = new_uuid()
    expected = stage.pd.ask(two([other, other], (5, 5)))
    fetches, loads = stage.counter("fetches", outcome="ok"), stage.counter("loads")
    with stage.pd.encodes(0):
        assert stage.pd.ask(two([uuid, uuid], (5, 5)), ec=ec).said() == expected.said()
    assert stage.counter("fetches", outcome="ok") == fetches + 1
    assert stage.counter("loads") == loads + 1


def test_what_the_prefix_cache_holds_is_not_fetched(stage: Stage) -> None:
    uuid = new_uuid()
    ec = stage.e.encode([picture(uuid, 5, 224)])
    parts = [BEFORE, picture(uuid, 5, 224), AFTER, AFTER]
    first = stage.pd.ask(parts, ec=ec)
    fetches, refused = stage.counter("fetches"), stage.counter("refused")
    again = stage.pd.ask(parts, ec={uuid: {"suite": ec[uuid]["suite"] | {"epoch": "0" * 16}}})
    assert again.said() == first.said()
    assert again.cached_tokens > 64
    assert (stage.counter("fetches"), stage.counter("refused")) == (fetches, refused)
    # Another question about it: the blocks before and of the image are shared.
    other = stage.pd.ask([BEFORE, picture(uuid, 5, 224), BETWEEN], ec=ec)
    alone = stage.pd.ask([BEFORE, picture(new_uuid(), 5, 224), BETWEEN])
    assert other.said() == alone.said()
    assert other.cached_tokens > alone.cached_tokens


def test_an_image_of_another_request_costs_no_encode(stage: Stage) -> None:
    uuid, ec = stage.encoded(5)
    reused = stage.e.metric("vllm_suite_ec_reused_items_total")
    with stage.e.encodes(0):
        again = stage.e.encode([picture(uuid, 5)])
    assert again[uuid]["suite"]["request_id"] == ec[uuid]["suite"]["request_id"]
    assert stage.e.metric("vllm_suite_ec_reused_items_total") == reused + 1
    assert stage.pd.ask(question(named(uuid)), ec=again).said() == stage.expected(5).said()


def test_what_the_encoders_pool_has_evicted_is_encoded_again(stage: Stage) -> None:
    """Also where vLLM's own book on the encoder still has it."""
    uuid, _ = stage.encoded(5)
    with stage.e.encodes(0):
        ec = stage.e.encode([picture(uuid, 5)])
    stage.pd.ask(question(named(uuid)), ec=ec, max_tokens=1)
    for seed in range(40):  # 73 KB each into 1 MB; what was read may go
        other = new_uuid()
        ec = stage.e.encode([picture(other, seed, 336)])
        if "suite" in ec[other]:
            stage.pd.ask([picture(other, seed, 336)], ec=ec, max_tokens=1)
    with stage.e.encodes(1):
        ec = stage.e.encode([picture(uuid, 5)])
    assert stage.pd.ask(question(named(uuid)), ec=ec).said() == stage.expected(5).said()


def test_after_new_weights_nothing_old_is_given_out(stage: Stage) -> None:
    uuid, old = stage.encoded(5)
    unasked, its = stage.encoded(6)
    stage.e.call(reset_encoder_cache)
    with stage.e.encodes(1):
        new = stage.e.encode([picture(uuid, 5)])
    assert new[uuid]["suite"]["request_id"] != old[uuid]["suite"]["request_id"]
    assert stage.pd.ask(question(named(uuid)), ec=new).said() == stage.expected(5).said()
    # A reference from before, to an item that nobody has asked for since.
    loads = stage.counter("loads")
    with stage.pd.encodes(1):
        stage.pd.ask(question(picture(unasked, 6)), ec=its)
    assert stage.counter("loads") == loads
