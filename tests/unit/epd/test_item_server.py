"""The item channel over real TCP: who gets an item, who is refused and why, and what a bad peer can cost."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest
import torch

from tests.unit.epd.producers import BLOCK, FACTS, KEY, SOON_S, Consumer, LocalProducer, picture
from vllm_epd.agent import Agent
from vllm_epd.answers import MAX_HOLD_S
from vllm_epd.item_server import ItemServer
from vllm_suite.encoded import (
    MAX_KEYS,
    MAX_MESSAGE_BYTES,
    Challenge,
    Claim,
    Granted,
    Hello,
    Probe,
    Refused,
    Release,
    Welcome,
    frame,
    hello_mac,
    item_content,
    item_location,
)
from vllm_suite.handoff import Handoff, Refusal

DAY_S = 86400.0


@pytest.fixture
def producer() -> Iterator[LocalProducer]:
    made = LocalProducer()
    yield made
    made.close()


@pytest.fixture
async def consumer(producer: LocalProducer) -> AsyncIterator[Consumer]:
    made = await Consumer.connect(producer.server.port)
    yield made
    made.close()


async def until(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not happened():
            await asyncio.sleep(0.005)


def changed(ref: Handoff, key: bytes | None = KEY, **fields: object) -> Handoff:
    """``ref`` with other fields, signed by somebody who knows the key."""
    return msgspec.structs.replace(ref, **fields).signed(key)


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


# --- releases ---


async def test_a_release_ends_the_claim_and_says_that_it_was_read(producer: LocalProducer, consumer: Consumer) -> None:
    producer.put("a")
    one, two = await consumer.granted("a"), await consumer.granted("a")
    assert one.claim != two.claim
    await consumer.release(one.claim)
    await consumer.release(one.claim)
    await consumer.release(two.claim, ok=False)
    await consumer.release(12345)
    assert producer.pool.take_stats().pins == 0
    counts = producer.server.take_counts()
    assert (counts.granted, counts.released, counts.given_up) == (2, 1, 1)
    assert producer.server.take_counts() == (0, 0, 0, {}, {})


async def test_nobody_ends_the_claim_of_another_connection(producer: LocalProducer, consumer: Consumer) -> None:
    producer.put("a")
    granted = await consumer.granted("a")
    other = await Consumer.connect(producer.server.port)
    await other.release(granted.claim)
    assert producer.pool.pinned(granted.claim) is not None
    other.close()
    await consumer.release(granted.claim)
    assert producer.pool.pinned(granted.claim) is None


async def test_a_claim_that_is_never_released_ends_by_itself(producer: LocalProducer, consumer: Consumer) -> None:
    small = LocalProducer(blocks=1, lease_s=0.0)
    try:
        small.put("a")
        reader = await Consumer.connect(small.server.port)
        granted = await reader.granted("a", hold_s=0.4)
        reader.close()
        assert small.pool.put("b", picture(seed=1)) is Refusal.NOT_STORED, "the reader went, its time did not"
        await until(lambda: not isinstance(small.pool.put("b", picture(seed=1)), Refusal))
        assert small.pool.pinned(granted.claim) is None
        assert small.pool.take_stats().expired_pins == 1
    finally:
        small.close()


async def test_a_consumer_that_met_wrong_bytes_makes_the_producer_look(
    producer: LocalProducer, consumer: Consumer
) -> None:
    ref = producer.put("a")
    granted = await consumer.granted("a", ref)
    await consumer.release(granted.claim, ok=False)
    granted = await consumer.granted("a", ref)
    producer.slab[5] ^= 1
    await consumer.release(granted.claim, ok=False)
    assert await consumer.claim("a", ref) == "expired"
    stats = producer.pool.take_stats()
    assert (stats.corrupt, stats.pins, stats.used_bytes) == (1, 0, {"device": 0})


# --- items that are still being encoded ---


async def test_a_pending_item_is_granted_when_it_comes(producer: LocalProducer, consumer: Consumer) -> None:
    waiting = [consumer.begin_claim("late", wait_s=SOON_S) for _ in range(3)]
    await until(lambda: producer.server.waiting == 3)
    producer.put("other")
    granted = await consumer.granted("other")  # nobody stands in line behind those that wait
    assert producer.server.waiting == 3
    producer.put("late", picture(seed=4))
    answers = [await consumer.answer(seq) for seq in waiting]
    stored = producer.pool.get("late")
    assert stored is not None
    assert [answer.checksum for answer in answers] == [stored.checksum] * 3
    assert len({granted.claim, *(answer.claim for answer in answers)}) == 4
    assert producer.server.waiting == 0
    assert producer.pool.take_stats().misses == 0


async def test_a_pending_item_that_does_not_come_is_unknown_in_the_end(
    producer: LocalProducer, consumer: Consumer
) -> None:
    begun = time.monotonic()
    assert await consumer.claim("never", wait_s=0.3) == "unknown"
    assert time.monotonic() - begun > 0.25
    assert producer.server.waiting == 0
    producer.put("never")
    assert isinstance(await consumer.claim("never"), Granted)


@pytest.mark.parametrize("wait_s", [0.0, -1.0, float("nan")])
async def test_who_does_not_wait_is_answered_at_once(
    producer: LocalProducer, consumer: Consumer, wait_s: float
) -> None:
    assert await consumer.claim("never", wait_s=wait_s) == "unknown"


async def test_the_longest_wait_has_an_end() -> None:
    impatient = LocalProducer(wait_s=0.2)
    try:
        consumer = await Consumer.connect(impatient.server.port)
        assert await consumer.claim("never", wait_s=float("inf")) == "unknown"
        consumer.close()
    finally:
        impatient.close()


async def test_a_pending_item_that_has_too_few_rows_is_refused_when_it_comes(
    producer: LocalProducer, consumer: Consumer
) -> None:
    seq = consumer.begin_claim("late", wait_s=SOON_S, rows=40)
    await until(lambda: producer.server.waiting == 1)
    producer.put("late", picture(39))
    assert (await consumer.answer(seq)).refusal == "truncated"


async def test_those_who_wait_hear_at_once_that_it_failed(producer: LocalProducer, consumer: Consumer) -> None:
    waiting = {name: consumer.begin_claim(name, wait_s=SOON_S) for name in ("nan", "shape", "large", "aborted")}
    await until(lambda: producer.server.waiting == 4)
    producer.pool.put("nan", torch.full((2, 2), float("nan")))
    producer.pool.put("shape", torch.zeros(2, 2, 2))
    producer.pool.put("large", torch.zeros(65 * BLOCK // 4, 1))
    producer.pool.announce_failure("aborted", Refusal.ABANDONED)
    found = {name: (await consumer.answer(seq)).refusal for name, seq in waiting.items()}
    assert found == {"nan": "non_finite", "shape": "wrong_shape", "large": "too_large", "aborted": "abandoned"}
    assert await consumer.claim("nan", wait_s=SOON_S) == "non_finite", "remembered for who comes a moment later"
    producer.put("nan")
    assert isinstance(await consumer.claim("nan"), Granted)


async def test_a_failure_is_not_remembered_for_long() -> None:
    forgetful = LocalProducer(failure_memory_s=0.1)
    try:
        consumer = await Consumer.connect(forgetful.server.port)
        forgetful.pool.announce_failure("a", Refusal.NOT_STORED)
        async with asyncio.timeout(SOON_S):
            while await consumer.claim("a", wait_s=0.01) != "unknown":
                await asyncio.sleep(0.01)
        seq = consumer.begin_claim("a", wait_s=SOON_S)
        await until(lambda: forgetful.server.waiting == 1)
        for other in range(100):
            forgetful.pool.announce_failure(str(other), Refusal.NOT_STORED)
        forgetful.put("a")
        assert isinstance(await consumer.answer(seq), Granted)
        await asyncio.sleep(0.15)
        forgetful.pool.announce_failure("last", Refusal.NOT_STORED)
        await until(lambda: list(forgetful.server._failed) == ["last"])
        consumer.close()
    finally:
        forgetful.close()


async def test_who_waits_and_goes_leaves_nothing_behind(producer: LocalProducer) -> None:
    consumer = await Consumer.connect(producer.server.port)
    consumer.begin_claim("late", wait_s=SOON_S)
    await until(lambda: producer.server.waiting == 1)
    consumer.close()
    await until(lambda: producer.server.waiting == 0 and producer.server.connections == 0)
    assert producer.server._waiting == {}
    producer.put("late")
    assert producer.pool.take_stats().pins == 0


async def test_more_than_may_wait_are_refused() -> None:
    small = LocalProducer(waiting=3)
    try:
        consumer = await Consumer.connect(small.server.port)
        for _ in range(3):
            consumer.begin_claim("late", wait_s=SOON_S)
        await until(lambda: small.server.waiting == 3)
        assert await consumer.claim("late", wait_s=SOON_S) == "no_room"
        assert small.server.take_counts().faults == {"too_many_waiting": 1}
        consumer.close()
    finally:
        small.close()


# --- probes ---


async def test_a_probe_names_what_is_kept_and_keeps_it(producer: LocalProducer, consumer: Consumer) -> None:
    producer.put("a"), producer.put("b", picture(seed=1))
    refs = await consumer.probe("a", "missing", "b", hold_s=7.0)
    assert set(refs) == {"a", "b"}
    assert refs["a"].lease_s == 7.0
    granted = await consumer.granted("b", refs["b"])
    stored = producer.pool.get("b")
    assert stored is not None
    assert granted.checksum == stored.checksum
    assert producer.pool.take_stats().pins == 1


async def test_a_probe_for_as_much_as_one_may_ask(producer: LocalProducer, consumer: Consumer) -> None:
    roomy = LocalProducer(blocks=MAX_KEYS)
    try:
        names = tuple(f"s-{at:032d}" for at in range(MAX_KEYS))
        for name in names:
            roomy.put(name, picture(1))
        asker = await Consumer.connect(roomy.server.port)
        assert set(await asker.probe(*names)) == set(names)
        asker.writer.write(frame(Probe(9, (*names, "one more"), 1.0)))
        assert await asker.closed()
        assert roomy.server.take_counts().faults == {"bad_message": 1}
    finally:
        roomy.close()


async def test_an_answer_too_long_for_the_channel_is_a_refusal(
    producer: LocalProducer, consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer.put("a")
    monkeypatch.setattr("vllm_epd.item_connection.MAX_MESSAGE_BYTES", 100)
    assert await consumer.claim("a") == "too_large"
    assert producer.server.take_counts().faults == {"answer_too_long": 1}


# --- peers that misbehave ---


@pytest.mark.parametrize(
    "junk",
    [
        struct.pack("!I", MAX_MESSAGE_BYTES + 1),
        b"\xff\xff\xff\xff" + b"x" * 64,
        struct.pack("!I", 1) + b"\xc1",
        struct.pack("!I", 0),
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        struct.pack("!I", 4096) + b"\x93" * 4096,
        struct.pack("!I", 22) + msgspec.msgpack.encode({"type": "unheard of", "s": 1})[:22].ljust(22, b"\0"),
    ],
)
@pytest.mark.parametrize("greeted", [True, False])
async def test_garbage_closes_its_connection_and_no_other(
    producer: LocalProducer, consumer: Consumer, junk: bytes, greeted: bool
) -> None:
    producer.put("a")
    if greeted:
        bad = await Consumer.connect(producer.server.port)
    else:
        bad = Consumer(*await asyncio.open_connection("127.0.0.1", producer.server.port))
        assert isinstance(await bad.next(), Challenge)
    bad.writer.write(junk)
    assert await bad.closed()
    await until(lambda: producer.server.connections == 1)
    assert producer.server.take_counts().faults == {"bad_message": 1}
    assert isinstance(await consumer.claim("a"), Granted)


async def test_a_stranger_may_not_send_long_messages(producer: LocalProducer) -> None:
    stranger = Consumer(*await asyncio.open_connection("127.0.0.1", producer.server.port))
    stranger.writer.write(struct.pack("!I", 5000))
    assert await stranger.closed()
    assert producer.server.take_counts().faults == {"bad_message": 1}


async def test_a_slow_peer_is_closed_and_one_that_is_only_quiet_is_not_a_fault() -> None:
    hasty = LocalProducer(greeting_s=1.0, frame_s=0.5, idle_s=1.5)
    try:
        silent = Consumer(*await asyncio.open_connection("127.0.0.1", hasty.server.port))
        assert await silent.closed()
        assert hasty.server.take_counts().faults == {"slow_peer": 1}, "no greeting"

        dribbling = Consumer(*await asyncio.open_connection("127.0.0.1", hasty.server.port))
        for byte in frame(Hello(1, "x" * 200, b"")):
            dribbling.writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
            if dribbling.writer.is_closing() or dribbling.reader.at_eof():
                break
        assert await dribbling.closed()
        assert hasty.server.take_counts().faults == {"slow_peer": 1}, "a greeting byte by byte"

        unfinished = await Consumer.connect(hasty.server.port)
        unfinished.writer.write(frame(Probe(2, ("a",), 1.0))[:-1])
        assert await unfinished.closed()
        assert hasty.server.take_counts().faults == {"slow_peer": 1}, "half a message"

        quiet = await Consumer.connect(hasty.server.port)
        assert await quiet.closed()
        assert hasty.server.take_counts().faults == {}, "quiet"
        assert hasty.server.connections == 0
    finally:
        hasty.close()


async def test_who_waits_for_an_item_is_not_idle() -> None:
    hasty = LocalProducer(idle_s=1.0)
    try:
        consumer = await Consumer.connect(hasty.server.port)
        seq = consumer.begin_claim("late", wait_s=SOON_S)
        await asyncio.sleep(2.2)
        hasty.put("late")
        assert isinstance(await consumer.answer(seq), Granted)
        assert await consumer.closed(), "now it is"
    finally:
        hasty.close()


async def test_a_peer_that_does_not_read_its_answers_is_closed() -> None:
    hasty = LocalProducer(frame_s=0.3, blocks=512)
    try:
        names = tuple(f"s-{at:032d}" for at in range(400))
        for name in names:
            hasty.put(name, picture(1))
        deaf = await Consumer.connect(hasty.server.port)
        deaf.reader._transport.pause_reading()  # type: ignore[attr-defined]
        sending = asyncio.create_task(_send_probes(deaf, names))
        await until(lambda: hasty.server.connections == 0)
        sending.cancel()
        assert hasty.server.take_counts().faults == {"slow_peer": 1}
        deaf.close()
    finally:
        hasty.close()


async def _send_probes(consumer: Consumer, names: tuple[str, ...]) -> None:
    for seq in range(10_000):
        consumer.writer.write(frame(Probe(seq, names, 1.0)))
        await consumer.writer.drain()


async def test_more_connections_than_may_be_are_closed() -> None:
    small = LocalProducer(connections=3)
    try:
        first = [await Consumer.connect(small.server.port) for _ in range(3)]
        extra = Consumer(*await asyncio.open_connection("127.0.0.1", small.server.port))
        assert await extra.closed()
        assert small.server.take_counts().faults == {"too_many_connections": 1}
        small.put("a")
        assert isinstance(await first[2].claim("a"), Granted)
        first[0].close()
        await until(lambda: small.server.connections == 2)
        assert isinstance((await Consumer.connect(small.server.port)).welcome, Welcome)
    finally:
        small.close()


async def test_a_reset_connection_is_nobodys_fault(producer: LocalProducer) -> None:
    consumer = await Consumer.connect(producer.server.port)
    sock = consumer.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    consumer.begin_claim("late", wait_s=SOON_S)
    await until(lambda: producer.server.waiting == 1)
    consumer.writer.transport.abort()
    await until(lambda: producer.server.connections == 0)
    assert producer.server.take_counts().faults == {}


# --- many, and the end ---


async def test_many_consumers_at_once(producer: LocalProducer) -> None:
    roomy = LocalProducer(blocks=256)
    try:
        names = [f"item {at}" for at in range(40)]
        consumers = [await Consumer.connect(roomy.server.port, name=str(at)) for at in range(25)]
        waits = [[consumer.begin_claim(name, wait_s=SOON_S) for name in names] for consumer in consumers]
        await until(lambda: roomy.server.waiting == 25 * 40)
        await asyncio.to_thread(lambda: [roomy.put(name, picture(seed=at)) for at, name in enumerate(names)])
        for consumer, seqs in zip(consumers, waits, strict=True):
            for name, seq in zip(names, seqs, strict=True):
                answer = await consumer.answer(seq)
                stored = roomy.pool.get(name)
                assert stored is not None
                assert isinstance(answer, Granted)
                assert answer.checksum == stored.checksum
                await consumer.release(answer.claim)
            consumer.close()
        stats, counts = roomy.pool.take_stats(), roomy.server.take_counts()
        assert (counts.granted, counts.released, stats.pins) == (1000, 1000, 0)
        assert stats.hits == {"device": 1000}
    finally:
        roomy.close()


async def test_closing_ends_those_who_wait(producer: LocalProducer) -> None:
    consumers = [await Consumer.connect(producer.server.port) for _ in range(5)]
    for consumer in consumers:
        consumer.begin_claim("late", wait_s=SOON_S)
    await until(lambda: producer.server.waiting == 5)
    await asyncio.to_thread(producer.server.close)
    for consumer in consumers:
        assert await consumer.closed()
    assert (producer.server.waiting, producer.server.connections) == (0, 0)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", producer.server.port)
    producer.put("late")  # the runner goes on storing
    await asyncio.to_thread(producer.server.close)


def test_closing_after_the_loop_has_stopped() -> None:
    producer = LocalProducer()
    producer.thread.stop()
    producer.server.close()
    producer.put("a")
    producer.close()


def test_a_taken_port_is_named(producer: LocalProducer) -> None:
    with pytest.raises(OSError, match=rf"item port.*127\.0\.0\.1:{producer.server.port} cannot be opened"):
        ItemServer(producer.pool, producer.agent, FACTS, KEY, "127.0.0.1", producer.server.port, producer.thread)
