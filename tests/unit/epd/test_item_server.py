"""The item channel over real TCP: who gets an item, who is refused and why."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
import torch

from tests.unit.epd.producers import FACTS, KEY, Consumer, LocalProducer, changed, picture
from vllm_epd.agent import Agent
from vllm_epd.answers import MAX_HOLD_S
from vllm_suite.encoded import (
    Challenge,
    Claim,
    Granted,
    Hello,
    Probe,
    Refused,
    Release,
    hello_mac,
    item_content,
    item_location,
)
from vllm_suite.frames import frame
from vllm_suite.handoff import Handoff

DAY_S = 86400.0


# --- greeting ---


async def test_a_greeting_says_who_this_is(producer: LocalProducer, consumer: Consumer) -> None:
    welcome = consumer.welcome
    assert welcome is not None
    assert (welcome.producer, welcome.epoch, welcome.model, welcome.layout) == FACTS
    assert welcome.agent == producer.agent.name
    other = Agent("test-greeting")
    assert other.add_remote(welcome.agent_metadata) == welcome.agent
    other.close()


@pytest.mark.parametrize("key", [b"another key", None])
async def test_a_wrong_key_gets_nothing(producer: LocalProducer, key: bytes | None) -> None:
    producer.put("a")
    stranger = Consumer(*await asyncio.open_connection("127.0.0.1", producer.server.port))
    assert await stranger.greet(key) == Refused(1, "bad_signature")
    assert await stranger.closed()
    stranger.close()
    assert producer.server.take_counts().refused == {"bad_signature": 1}


async def test_a_greeting_is_good_for_one_connection_and_one_name(producer: LocalProducer) -> None:
    """Each challenge is new, so that what somebody overheard is of no use."""
    nonces = []
    for _ in range(3):
        stranger = Consumer(*await asyncio.open_connection("127.0.0.1", producer.server.port))
        challenge = await stranger.next()
        assert isinstance(challenge, Challenge)
        nonces.append(challenge.nonce)
        mac = hello_mac(KEY, nonces[0], "consumer") if len(nonces) > 1 else hello_mac(KEY, nonces[0], "somebody else")
        stranger.writer.write(frame(Hello(1, "consumer", mac)))
        assert await stranger.next() == Refused(1, "bad_signature")
        stranger.close()
    assert len(set(nonces)) == 3
    assert min(map(len, nonces)) >= 16


async def test_without_a_key_everybody_may(producer: LocalProducer) -> None:
    open_producer = LocalProducer(key=None)
    try:
        ref = open_producer.put("a")
        assert ref.mac == ""
        consumer = await Consumer.connect(open_producer.server.port, key=b"a key of its own")
        assert isinstance(await consumer.claim("a", ref), Granted)
        consumer.close()
    finally:
        open_producer.close()


@pytest.mark.parametrize(
    "first", [Claim(1, "a", None, *FACTS, 16, 0.0, 5.0), Release(1, 1, True), Probe(1, ("a",), 1.0)]
)
async def test_nothing_is_answered_before_the_greeting(producer: LocalProducer, first: Claim | Release | Probe) -> None:
    producer.put("a")
    stranger = Consumer(*await asyncio.open_connection("127.0.0.1", producer.server.port))
    assert isinstance(await stranger.next(), Challenge)
    stranger.writer.write(frame(first))
    assert await stranger.closed()
    assert producer.server.take_counts().faults == {"bad_message": 1}
    assert producer.pool.take_stats().pins == 0


async def test_a_second_greeting_is_no_message(producer: LocalProducer, consumer: Consumer) -> None:
    consumer.writer.write(frame(Hello(9, "again", b"")))
    assert await consumer.closed()
    assert producer.server.take_counts().faults == {"bad_message": 1}


# --- claims ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
async def test_a_grant_says_what_the_item_is(producer: LocalProducer, consumer: Consumer, dtype: torch.dtype) -> None:
    ref = producer.put("a", picture(16, 65, dtype=dtype))
    granted = await consumer.granted("a", ref, hold_s=3.0)
    stored = producer.pool.get("a")
    assert stored is not None
    assert (granted.rows, granted.width, granted.dtype) == (16, 65, str(dtype).removeprefix("torch."))
    assert granted.size == 16 * 65 * dtype.itemsize
    assert (granted.seed, granted.checksum, granted.hold_s) == (stored.seed, stored.checksum, 3.0)
    assert (granted.memory, granted.device) == ("DRAM", 0)
    assert granted.runs == stored.addresses()
    assert producer.pool.pinned(granted.claim) == stored


async def test_the_reference_in_json_is_the_one_that_is_claimed(producer: LocalProducer, consumer: Consumer) -> None:
    """As it travels through a router: 30 and 30.0 are different text and the same reference."""
    ref = producer.put("a")
    body = msgspec.json.decode(msgspec.json.encode(ref.to_json()))
    assert isinstance(await consumer.claim("a", msgspec.convert(body, Handoff)), Granted)
    whole = producer.server.facts.reference("a", ref.request_id, ref.tokens, 30, KEY)
    body = msgspec.json.decode(msgspec.json.encode(whole.to_json()))
    assert isinstance(await consumer.claim("a", msgspec.convert(body, Handoff)), Granted)


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"producer": "other"}, "foreign_producer"),
        ({"epoch": "before"}, "stale_epoch"),
        ({"model": "other"}, "foreign_model"),
        ({"layout": "other"}, "foreign_layout"),
        ({"content": item_content("b")}, "foreign_content"),
        ({"location": item_location("a", "127.0.0.1", 1)}, "tampered"),
        ({"claim_host": "127.0.0.2"}, "tampered"),
        ({"claim_port": 1}, "tampered"),
        ({"request_id": "item-99"}, "tampered"),
        ({"request_id": "cmpl-1"}, "tampered"),
        ({"version": 2}, "tampered"),
        ({"tokens": 17}, "tampered"),
        ({"tokens": 15}, "truncated"),
    ],
)
async def test_a_reference_that_says_anything_else_is_refused(
    producer: LocalProducer, consumer: Consumer, fields: dict[str, object], refusal: str
) -> None:
    ref = producer.put("a")
    assert await consumer.claim("a", changed(ref, **fields)) == refusal
    assert await consumer.claim("a", msgspec.structs.replace(ref, **fields)) == "bad_signature"
    assert producer.pool.take_stats().pins == 0
    assert producer.server.take_counts().refused == {refusal: 1, "bad_signature": 1}
    assert isinstance(await consumer.claim("a", ref), Granted)


async def test_every_field_of_a_reference_is_compared_or_signed(producer: LocalProducer, consumer: Consumer) -> None:
    ref = producer.put("a")
    for name in ref.__struct_fields__:
        value = getattr(ref, name)
        other = value + "0" if isinstance(value, str) else value + 1
        assert await consumer.claim("a", msgspec.structs.replace(ref, **{name: other})) == "bad_signature", name


@pytest.mark.parametrize(
    ("fields", "refusal"),
    [
        ({"producer": "other"}, "foreign_producer"),
        ({"epoch": "before"}, "stale_epoch"),
        ({"model": "other"}, "foreign_model"),
        ({"layout": "other"}, "foreign_layout"),
        ({"rows": 17}, "truncated"),
        ({"rows": 0}, "malformed"),
        ({"rows": -1}, "malformed"),
        ({"identifier": "b"}, "unknown"),
        ({"identifier": ""}, "unknown"),
    ],
)
async def test_a_claim_without_a_reference_is_compared_as_well(
    producer: LocalProducer, consumer: Consumer, fields: dict[str, object], refusal: str
) -> None:
    producer.put("a")
    changes = {"identifier": "a"} | fields
    assert await consumer.claim(changes.pop("identifier"), None, **changes) == refusal  # type: ignore[arg-type]
    assert producer.pool.take_stats().pins == 0
    assert isinstance(await consumer.claim("a"), Granted)


async def test_another_items_reference_does_not_open_this_one(producer: LocalProducer, consumer: Consumer) -> None:
    ref = producer.put("a")
    producer.put("b", picture(seed=2))
    assert await consumer.claim("b", ref) == "foreign_content"


async def test_an_item_that_is_gone_has_expired_and_one_that_never_was_is_unknown(
    producer: LocalProducer, consumer: Consumer
) -> None:
    ref = producer.put("a")
    assert producer.pool.drop("a")
    assert await consumer.claim("a", ref) == "expired"
    assert await consumer.claim("a", ref, wait_s=0.05) == "expired"
    assert await consumer.claim("a") == "unknown"
    assert await consumer.claim("never", wait_s=0.05) == "unknown"
    assert producer.pool.take_stats().misses == 4


async def test_a_reference_from_before_an_eviction_is_good_for_what_was_stored_again(
    producer: LocalProducer, consumer: Consumer
) -> None:
    ref = producer.put("a")
    producer.pool.drop("a")
    again = producer.put("a", picture(seed=1))
    assert again.request_id != ref.request_id
    granted = await consumer.granted("a", ref)
    stored = producer.pool.get("a")
    assert stored is not None
    assert granted.checksum == stored.checksum
    producer.put("a", picture(8))
    assert await consumer.claim("a", ref, rows=8) == "tampered", "another number of rows is another item"


@pytest.mark.parametrize(
    ("asked", "given"), [(0.0, 0.0), (-5.0, 0.0), (float("nan"), 0.0), (float("inf"), MAX_HOLD_S), (DAY_S, MAX_HOLD_S)]
)
async def test_nobody_pins_for_ever(producer: LocalProducer, consumer: Consumer, asked: float, given: float) -> None:
    producer.put("a")
    granted = await consumer.granted("a", hold_s=asked)
    assert granted.hold_s == given
    assert producer.pool.expire(time.monotonic() + given + 0.1) == 1
    refs = await consumer.probe("a", hold_s=asked)
    assert refs["a"].lease_s == given
