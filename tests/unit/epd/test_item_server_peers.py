"""The item channel over real TCP: what a bad peer can cost, many peers, and the end."""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec
import pytest

from tests.unit.epd.producers import FACTS, KEY, SOON_S, Consumer, LocalProducer, picture, until
from vllm_epd.item_server import ItemServer
from vllm_suite.encoded import MAX_MESSAGE_BYTES, Challenge, Granted, Hello, Probe, Welcome
from vllm_suite.frames import frame

DAY_S = 86400.0


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
