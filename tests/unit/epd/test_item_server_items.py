"""The item channel over real TCP: releases, items that are still being encoded, probes."""

from __future__ import annotations

import asyncio
import time

import pytest
import torch

from tests.unit.epd.producers import BLOCK, SOON_S, Consumer, LocalProducer, picture, until
from vllm_suite.encoded import MAX_KEYS, Granted, Probe
from vllm_suite.frames import frame
from vllm_suite.handoff import Refusal

DAY_S = 86400.0


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
