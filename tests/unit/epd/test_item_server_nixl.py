"""Items read by real NIXL, from this process and from another: whole, tampered with, and from producers that fail."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.unit.epd.producers import (
    BLOCK,
    SOON_S,
    Consumer,
    LocalProducer,
    ProducerProcess,
    Reader,
    picture,
    right,
)
from vllm_epd.agent import Agent, TransferError, _paired
from vllm_epd.checksum import checksum, flat_bytes
from vllm_epd.pool import Pool, Stored
from vllm_epd.tiers import new_slab
from vllm_suite.encoded import Granted


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


@pytest.fixture
def producer() -> Iterator[LocalProducer]:
    made = LocalProducer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def process() -> Iterator[ProducerProcess]:
    made = ProducerProcess()
    yield made
    made.close()


async def connected(port: int, reader: Reader) -> tuple[Consumer, str]:
    consumer = await Consumer.connect(port)
    assert consumer.welcome is not None
    return consumer, reader.agent.add_remote(consumer.welcome.agent_metadata)


async def eventually(happened: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not happened():
            await asyncio.sleep(0.01)


# --- between two agents of this process ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (16, 64), (33, 1001)])
async def test_what_arrives_is_what_was_put(
    producer: LocalProducer, reader: Reader, dtype: torch.dtype, rows: int, width: int
) -> None:
    tensor = picture(rows, width, seed=2, dtype=dtype)
    ref = producer.put("a", tensor)
    consumer, remote = await connected(producer.server.port, reader)
    granted = await consumer.granted("a", ref, rows=rows)
    data = await reader.read(remote, granted)
    assert right(data, granted)
    assert torch.equal(data, flat_bytes(tensor))
    consumer.close()


async def test_an_item_in_pieces_arrives_whole_into_pieces(producer: LocalProducer, reader: Reader) -> None:
    for at in range(64):
        producer.put(str(at), picture(BLOCK // 128))
    for at in range(0, 40, 2):
        producer.pool.drop(str(at))
    tensor = picture(600, 64, seed=8)
    ref = producer.put("scattered", tensor)
    consumer, remote = await connected(producer.server.port, reader)
    granted = await consumer.granted("scattered", ref, rows=600)
    assert len(granted.runs) == 19
    base, third = reader.buffer.data_ptr(), granted.size // 3
    rest = granted.size - 2 * third
    local = [(base, third), (base + 3 * third, 0), (base + 5 * third, third), (base + 8 * third, rest)]
    read = reader.agent.read(remote, local, granted.runs, granted.memory)
    await eventually(lambda: read.poll() != "reading")
    assert read.state == "done"
    parts = [reader.buffer[at - base : at - base + size] for at, size in local]
    assert torch.equal(torch.cat(parts), flat_bytes(tensor))
    consumer.close()


async def test_an_item_of_the_second_tier_is_read_where_it_is(reader: Reader) -> None:
    slab, host = new_slab(BLOCK), new_slab(2 * BLOCK)
    pool, agent = Pool(slab, BLOCK, 30.0, host_slab=host), Agent(f"two-tiers-{time.monotonic_ns()}")
    agent.register(slab)
    agent.register(host)
    remote = reader.agent.add_remote(agent.metadata())
    for at in range(3):
        stored = pool.put(str(at), picture(seed=at))
        assert isinstance(stored, Stored)
    for at, tier in enumerate(("host", "host", "device")):
        found = pool.get(str(at))
        assert found is not None
        assert found.tier == tier
        read = reader.agent.read(remote, [(reader.buffer.data_ptr(), found.size)], found.addresses(), found.memory)
        await eventually(lambda read=read: read.poll() != "reading")  # type: ignore[misc]
        assert torch.equal(reader.buffer[: found.size], flat_bytes(picture(seed=at)))
    agent.close()


async def test_an_agent_reads_its_own_pool(producer: LocalProducer) -> None:
    """An instance in both roles may be named in a reference to itself."""
    buffer = new_slab(BLOCK)
    agent = Agent(f"self-{time.monotonic_ns()}")
    agent.register(producer.slab)
    agent.register(buffer)
    producer.put("a")
    stored = producer.pool.get("a")
    assert stored is not None
    read = agent.read(agent.name, [(buffer.data_ptr(), stored.size)], stored.addresses(), stored.memory)
    await eventually(lambda: read.poll() != "reading")
    assert read.state == "done", read.error
    assert checksum(buffer[: stored.size], stored.seed) == stored.checksum
    agent.close()


async def test_tampered_memory_is_caught_on_arrival_and_dropped_at_the_producer(
    producer: LocalProducer, reader: Reader
) -> None:
    ref = producer.put("a")
    consumer, remote = await connected(producer.server.port, reader)
    granted = await consumer.granted("a", ref)
    assert right(await reader.read(remote, granted), granted)
    producer.slab[1234] ^= 4
    assert not right(await reader.read(remote, granted), granted)
    await consumer.release(granted.claim, ok=False)
    assert await consumer.claim("a", ref) == "expired"
    consumer.close()


async def test_addresses_outside_what_is_registered_are_refused(producer: LocalProducer, reader: Reader) -> None:
    producer.put("a")
    consumer, remote = await connected(producer.server.port, reader)
    granted = await consumer.granted("a")
    here, (start, size) = reader.buffer.data_ptr(), granted.runs[0]
    outside = producer.slab.data_ptr() + producer.slab.numel()
    for local, far in (
        ([(here, size)], [(outside, size)]),
        ([(here, size)], [(outside - size + 1, size)]),
        ([(here, size)], [(0x1000, size)]),
        ([(here + reader.buffer.numel(), size)], [(start, size)]),
    ):
        with pytest.raises(TransferError):
            reader.agent.read(remote, local, far, "DRAM")
    with pytest.raises(TransferError):
        reader.agent.read("nobody", [(here, size)], [(start, size)], "DRAM")
    with pytest.raises(TransferError):
        reader.agent.read(remote, [(here, size)], [(start, size)], "VRAM")
    with pytest.raises(ValueError, match="differ in size"):
        reader.agent.read(remote, [(here, size - 1)], [(start, size)], "DRAM")
    with pytest.raises(ValueError, match="nothing"):
        reader.agent.read(remote, [(here, 0)], [(start, 0)], "DRAM")
    assert right(await reader.read(remote, granted), granted), "and it still works"
    consumer.close()


@pytest.mark.parametrize("junk", [b"", b"x", b"\0" * 100, b"\xff" * 500, os.urandom(400)])
def test_metadata_that_is_none_is_refused(reader: Reader, junk: bytes) -> None:
    with pytest.raises(TransferError):
        reader.agent.add_remote(junk)


async def test_metadata_cut_short_is_refused_and_spoils_no_other_producer(
    producer: LocalProducer, reader: Reader
) -> None:
    """NIXL keeps what it read of the producer's name, so that one stays unknown to this agent; others do not care."""
    other = Agent(f"cut-short-{time.monotonic_ns()}")
    other.register(new_slab(BLOCK))
    whole = other.metadata()
    for length in range(1, len(whole), 37):
        with pytest.raises(TransferError):
            reader.agent.add_remote(whole[:length])
    other.close()
    producer.put("a")
    consumer, remote = await connected(producer.server.port, reader)
    granted = await consumer.granted("a")
    assert right(await reader.read(remote, granted), granted)
    consumer.close()


async def test_a_forgotten_agent_can_be_learnt_again(producer: LocalProducer, reader: Reader) -> None:
    producer.put("a")
    for _ in range(3):
        consumer, remote = await connected(producer.server.port, reader)
        granted = await consumer.granted("a")
        assert right(await reader.read(remote, granted), granted)
        reader.agent.forget(remote)
        reader.agent.forget(remote)
        with pytest.raises(TransferError):
            reader.begin(remote, granted)
        consumer.close()


def test_pieces_of_both_sides_are_cut_alike() -> None:
    assert _paired([(0, 10)], [(100, 4), (200, 6)]) == ([(0, 4), (4, 6)], [(100, 4), (200, 6)])
    assert _paired([(0, 3), (50, 7)], [(100, 5), (200, 5)]) == (
        [(0, 3), (50, 2), (52, 5)],
        [(100, 3), (103, 2), (200, 5)],
    )


# --- between processes ---


async def test_another_process_reads_many_items_at_once(process: ProducerProcess, reader: Reader) -> None:
    refs = {f"item {at}": process.put(f"item-{at}", rows=16 + at, seed=at) for at in range(20)}
    consumer, remote = await connected(process.port, reader)
    granted = [
        await consumer.granted(name.replace(" ", "-"), ref, rows=16 + at) for at, (name, ref) in enumerate(refs.items())
    ]
    reads = [reader.begin(remote, one, at=at * 2 * BLOCK) for at, one in enumerate(granted)]
    await eventually(lambda: all(read.poll() != "reading" for read in reads))
    for at, (read, one) in enumerate(zip(reads, granted, strict=True)):
        assert read.state == "done", read.error
        data = reader.buffer[at * 2 * BLOCK :][: one.size]
        assert right(data, one)
        assert torch.equal(data, flat_bytes(picture(16 + at, seed=at)))
        await consumer.release(one.claim)
    consumer.close()


async def test_another_process_grants_what_comes_later_and_its_tampering_is_caught(
    process: ProducerProcess, reader: Reader
) -> None:
    consumer, remote = await connected(process.port, reader)
    seq = consumer.begin_claim("late", wait_s=SOON_S)
    ref = await asyncio.to_thread(process.put, "late", 16, 3)
    granted = await consumer.answer(seq)
    assert isinstance(granted, Granted)
    assert torch.equal(await reader.read(remote, granted), flat_bytes(picture(seed=3)))
    for at in (0, 1000, granted.size - 1):
        await asyncio.to_thread(process.ask, "tamper", "late", str(at))
        data = await reader.read(remote, granted)
        assert not right(data, granted)
        await asyncio.to_thread(process.ask, "tamper", "late", str(at))
    assert right(await reader.read(remote, granted), granted)
    await asyncio.to_thread(process.ask, "tamper", "late", "7")
    await consumer.release(granted.claim, ok=False)
    assert process.ask("has", "late") == {"has": False}
    assert await consumer.claim("late", ref) == "expired"
    consumer.close()


async def test_a_killed_producer_fails_its_reads_and_its_next_life_is_another(reader: Reader) -> None:
    first = ProducerProcess()
    try:
        ref = first.put("a")
        consumer, remote = await connected(first.port, reader)
        granted = await consumer.granted("a", ref)
        assert right(await reader.read(remote, granted), granted)
        first.process.kill()
        first.process.wait(SOON_S)
        assert await consumer.closed()
        begun = time.monotonic()
        try:
            read = reader.begin(remote, granted)
        except TransferError:
            pass
        else:
            await eventually(lambda: read.poll() != "reading")
            assert read.state == "failed"
            assert read.error
            assert read.cancel()
        assert time.monotonic() - begun < SOON_S
        reader.agent.forget(remote)
        second = ProducerProcess(str(first.port), "next epoch")
        try:
            again, remote = await connected(second.port, reader)
            assert await again.claim("a", ref) == "stale_epoch"
            assert await again.claim("a") == "stale_epoch"
            assert await again.claim("a", epoch="next epoch") == "unknown"
            await asyncio.to_thread(second.put, "a")
            granted = await again.granted("a", epoch="next epoch")
            assert right(await reader.read(remote, granted), granted)
            again.close()
        finally:
            second.close()
    finally:
        first.close()


async def test_a_stopped_producers_first_read_can_be_given_up(process: ProducerProcess, reader: Reader) -> None:
    """Nothing is connected yet: the read cannot complete, and after it was given up nothing is written."""
    ref = process.put("a")
    consumer = await Consumer.connect(process.port)
    assert consumer.welcome is not None
    granted = await consumer.granted("a", ref)
    os.kill(process.process.pid, signal.SIGSTOP)
    try:
        # Only now: UCX begins to connect here, and what is connected can be read without the producer's doing.
        remote = reader.agent.add_remote(consumer.welcome.agent_metadata)
        read = reader.begin(remote, granted)
        for _ in range(50):
            assert read.poll() == "reading"
            await asyncio.sleep(0.01)
        given_up = read.cancel()
        assert read.state == "failed"
        assert read.poll() == "failed"
    finally:
        os.kill(process.process.pid, signal.SIGCONT)
    await eventually(read.cancel)
    assert given_up, "the memory is free at once"
    reader.buffer.zero_()
    reader.agent.forget(remote)
    assert await consumer.granted("a", ref), "the producer is back"
    await asyncio.sleep(0.5)
    assert not reader.buffer.any(), "written to after it was given up"
    remote = reader.agent.add_remote(consumer.welcome.agent_metadata)
    assert right(await reader.read(remote, granted), granted)
    consumer.close()


async def test_an_idle_producer_uses_no_processor_time(process: ProducerProcess, reader: Reader) -> None:
    """With a consumer that has read, and one that waits for an item: the two states a producer idles in."""
    consumer, remote = await connected(process.port, reader)
    ref = await asyncio.to_thread(process.put, "a")
    granted = await consumer.granted("a", ref)
    await reader.read(remote, granted)
    seq = consumer.begin_claim("late", wait_s=4 * SOON_S)
    await asyncio.sleep(0.5)
    per_second = os.sysconf("SC_CLK_TCK")
    least = None
    for _ in range(3):
        before = process.cpu_ticks()
        await asyncio.sleep(2.0)
        used = (process.cpu_ticks() - before) / (2.0 * per_second)
        least = used if least is None else min(least, used)
        if least < 0.05:
            break
    print(f"idle: {least:.3f} of a core")
    assert least is not None
    assert least < 0.05, "of a core; a progress thread that spins takes half of one"
    await asyncio.to_thread(process.put, "late")
    assert isinstance(await consumer.answer(seq), Granted)
    consumer.close()


def test_the_delay_is_set_for_its_own_agent_only() -> None:
    import nixl._api as api

    before = api.nixlBind.nixlAgentConfig
    Agent("quiet", 1000).close()
    assert api.nixlBind.nixlAgentConfig is before
