"""Fetches over real TCP and NIXL, from producers in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.unit.epd.producers import FACTS, KEY, SOON_S, LocalProducer, picture
from vllm_epd.agent import Agent
from vllm_epd.config import EpdConfig
from vllm_epd.item_server import Facts
from vllm_epd.messages import Fetch, Fetched
from vllm_epd.peers import Me
from vllm_epd.puller import Puller
from vllm_epd.tiers import new_slab
from vllm_suite.encoded import Pending, Where
from vllm_suite.handoff import Handoff, Refusal
from vllm_suite.loop_thread import LoopThread

CONFIG = EpdConfig(
    claim_timeout_s=2.0,
    connect_timeout_s=2.0,
    fetch_timeout_s=10.0,
    hold_s=10.0,
    read_timeout_s=10.0,
    peer_retry_s=30.0,
)
ROWS, WIDTH = 16, 64
ITEM_BYTES = ROWS * WIDTH * 2


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SOON_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Bench:
    """A puller and its reports."""

    def __init__(self, config: EpdConfig = CONFIG, size: int = 64 << 10, own: LocalProducer | None = None) -> None:
        self.thread = LoopThread("puller-test")
        self.agent = Agent(f"puller-{time.monotonic_ns()}")
        self.slab = new_slab(size)
        self.agent.register(self.slab)
        self.reports: dict[int, Fetched] = {}
        self.tickets = 0
        me = Me("consumer", KEY, FACTS.model, FACTS.layout)
        place = (own.pool, where(own)) if own is not None else None
        self.puller = Puller(config, self.thread, self.agent, self.slab, "bfloat16", me, self._report, place)

    def _report(self, report: Fetched) -> None:
        assert report.ticket not in self.reports
        self.reports[report.ticket] = report

    def begin(self, identifier: str, ref: Handoff | None = None, *places: Where, **changes: Any) -> int:
        self.tickets += 1
        pending = Pending(identifier=identifier, candidates=places, wait_s=10.0).signed(KEY) if places else None
        fields: dict[str, Any] = {"rows": ROWS, "width": WIDTH, "wait_s": 10.0 if places else 0.0, "fetch_s": 10.0}
        self.puller.fetch(Fetch(self.tickets, identifier, ref, pending, **(fields | changes)))
        return self.tickets

    def end(self, ticket: int) -> Fetched:
        until(lambda: ticket in self.reports)
        return self.reports[ticket]

    def fetch(self, *args: Any, **changes: Any) -> Fetched:
        return self.end(self.begin(*args, **changes))

    @property
    def used(self) -> int:
        return self.puller.room.used_blocks

    def close(self) -> None:
        self.puller.close()
        self.thread.stop()
        self.agent.close()


def where(producer: LocalProducer) -> Where:
    facts = producer.server.facts
    return Where(facts.producer, facts.epoch, facts.host, facts.port)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


@pytest.fixture
def make() -> Iterator[Callable[..., LocalProducer]]:
    made: list[LocalProducer] = []

    def producer(**options: Any) -> LocalProducer:
        made.append(LocalProducer(**options))
        return made[-1]

    yield producer
    for one in made:
        one.close()


Make = Callable[..., LocalProducer]


def test_an_item_arrives_and_leaves_its_place(bench: Bench, make: Make) -> None:
    producer = make()
    report = bench.fetch("i", producer.put("i", picture(seed=1)))
    assert (report.refusal, report.size, report.producer) == ("", ITEM_BYTES, FACTS.producer)
    assert bench.used == 1
    tensor = bench.puller.take(report.ticket)
    assert tensor is not None
    assert torch.equal(tensor, picture(seed=1))
    assert tensor.data_ptr() not in range(bench.slab.data_ptr(), bench.slab.data_ptr() + bench.slab.numel())
    until(lambda: bench.used == 0)
    assert bench.puller.take(report.ticket) is None
    until(lambda: producer.server.take_counts().released == 1)


def test_a_scattered_item_into_a_scattered_pool(make: Make) -> None:
    bench = Bench(size=4 * 4096)
    producer = make(blocks=4)
    try:
        small = [bench.fetch(f"s{n}", producer.put(f"s{n}", picture(8, 256, n)), rows=8, width=256) for n in range(4)]
        for n in (0, 2):  # both pools have holes of one block each now
            bench.puller.drop(small[n].ticket)
            producer.pool.drop(f"s{n}")
        until(lambda: bench.used == 2)
        report = bench.fetch("big", producer.put("big", picture(16, 256, 9)), rows=16, width=256)
        assert report.refusal == ""
        tensor = bench.puller.take(report.ticket)
        assert tensor is not None
        assert torch.equal(tensor, picture(16, 256, 9))
    finally:
        bench.close()


@pytest.mark.parametrize(
    ("order", "refusal"),
    [
        ({"rows": 17}, "truncated"),
        ({"rows": 8}, "wrong_shape"),
        ({"width": 32}, "wrong_shape"),
        ({"rows": 1 << 20}, "too_large"),
    ],
)
def test_what_is_not_as_needed_is_refused(bench: Bench, make: Make, order: dict[str, int], refusal: str) -> None:
    report = bench.fetch("i", make().put("i"), **order)
    assert report.refusal == refusal
    assert bench.used == 0


def test_another_type_is_refused(bench: Bench, make: Make) -> None:
    report = bench.fetch("i", make().put("i", picture(dtype=torch.float16)))
    assert report.refusal == "wrong_shape"


def test_bytes_that_changed_are_refused_and_the_producer_drops_them(bench: Bench, make: Make) -> None:
    producer = make()
    ref = producer.put("i")
    stored = producer.pool.get("i")
    assert stored is not None
    producer.slab[stored.runs[0][0] + 7] ^= 16
    assert bench.fetch("i", ref).refusal == "bad_checksum"
    assert bench.used == 0
    until(lambda: not producer.pool.contains("i"))


def test_an_item_that_is_gone(bench: Bench, make: Make) -> None:
    producer = make()
    ref = producer.put("i")
    producer.pool.drop("i")
    assert bench.fetch("i", ref).refusal == "expired"


def test_another_life_and_another_instance_at_the_address(bench: Bench, make: Make) -> None:
    producer = make(facts=Facts("producer", "later", "model", "layout"))
    old = make().put("i")
    place = {"claim_port": producer.server.port}
    stale = Handoff(**{**old.to_json(), **place}).signed(KEY)
    assert bench.fetch("i", stale).refusal == "stale_epoch"
    foreign = Handoff(**{**old.to_json(), **place, "producer": "other", "epoch": "later"}).signed(KEY)
    assert bench.fetch("i", foreign).refusal == "foreign_producer"


def test_a_dead_producer_is_asked_once(bench: Bench, make: Make) -> None:
    producer = make()
    ref = producer.put("i")
    producer.server.close()
    begun = time.monotonic()
    assert {bench.fetch("i", ref).refusal for _ in range(50)} == {"peer_dead"}
    assert time.monotonic() - begun < CONFIG.peer_retry_s


async def _silent(port_found: Callable[[int], None], stop: asyncio.Event) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port_found(server.sockets[0].getsockname()[1])
    await stop.wait()
    server.close()


def test_a_producer_that_says_nothing_costs_one_timeout(make: Make) -> None:
    bench = Bench(CONFIG.model_copy(update={"claim_timeout_s": 0.3}))
    thread, ports = LoopThread("silent"), list[int]()
    stop = asyncio.Event()
    asyncio.run_coroutine_threadsafe(_silent(ports.append, stop), thread.loop)
    until(lambda: ports)
    ref = Handoff(**{**make().put("i").to_json(), "claim_port": ports[0]}).signed(KEY)
    try:
        tickets = [bench.begin("i", ref) for _ in range(20)]
        refusals = [bench.end(ticket).refusal for ticket in tickets]
        assert set(refusals) <= {"claim_timeout", "peer_dead"}
        assert bench.fetch("i", ref).refusal == "peer_dead"
        assert bench.used == 0
    finally:
        thread.loop.call_soon_threadsafe(stop.set)
        bench.close()
        thread.stop()


# --- items under way ---


def test_an_item_that_is_made_later(bench: Bench, make: Make) -> None:
    producer = make()
    ticket = bench.begin("i", None, where(producer))
    until(lambda: producer.server.waiting == 1)
    assert bench.used == 0  # nothing is kept free for it
    producer.put("i", picture(seed=3))
    report = bench.end(ticket)
    assert report.refusal == ""
    assert report.producer == FACTS.producer
    tensor = bench.puller.take(ticket)
    assert tensor is not None
    assert torch.equal(tensor, picture(seed=3))


def test_an_item_that_nobody_makes(bench: Bench, make: Make) -> None:
    assert bench.fetch("i", None, where(make()), wait_s=0.5).refusal == "claim_timeout"


def test_an_encoding_that_failed_ends_the_wait(bench: Bench, make: Make) -> None:
    producer = make()
    ticket = bench.begin("i", None, where(producer))
    until(lambda: producer.server.waiting == 1)
    producer.pool.announce_failure("i", Refusal.NON_FINITE)
    assert bench.end(ticket).refusal == "non_finite"


def test_the_next_producer_is_asked_when_one_fails(bench: Bench, make: Make) -> None:
    dead, alive = make(facts=Facts("dead", "epoch", "model", "layout")), make()
    place = where(dead)
    dead.server.close()
    ticket = bench.begin("i", None, place, where(alive))
    until(lambda: alive.server.waiting == 1)
    alive.put("i")
    assert bench.end(ticket).refusal == ""


def test_the_next_producer_is_asked_when_one_takes_long(bench: Bench, make: Make) -> None:
    first, second = make(facts=Facts("first", "epoch", "model", "layout")), make()
    ticket = bench.begin("i", None, where(first), where(second))
    until(lambda: first.server.waiting == 1)
    until(lambda: second.server.waiting == 1)
    second.put("i")
    report = bench.end(ticket)
    assert (report.refusal, report.producer) == ("", FACTS.producer)


# --- room ---


def test_room_is_given_in_order_and_waited_for(make: Make) -> None:
    bench = Bench(size=4096)  # one item
    producer = make()
    try:
        first = bench.fetch("a", producer.put("a", picture(seed=1)))
        assert first.refusal == ""
        waiting = [bench.begin(name, producer.put(name, picture(seed=n))) for n, name in enumerate("bcd", 2)]
        until(lambda: bench.puller.room.waiting == 3)
        bench.puller.drop(waiting[1])
        until(lambda: bench.puller.room.waiting == 2)
        for ticket, seed in ((first.ticket, 1), (waiting[0], 2), (waiting[2], 4)):
            assert bench.end(ticket).refusal == ""
            tensor = bench.puller.take(ticket)
            assert tensor is not None
            assert torch.equal(tensor, picture(seed=seed))
        until(lambda: bench.used == 0)
        assert waiting[1] not in bench.reports
    finally:
        bench.close()


def test_a_pool_that_stays_full(make: Make) -> None:
    bench = Bench(size=4096)
    producer = make()
    try:
        assert bench.fetch("a", producer.put("a")).refusal == ""
        assert bench.fetch("b", producer.put("b"), fetch_s=0.3).refusal == "no_room"
    finally:
        bench.close()


def test_what_is_dropped_leaves_nothing(bench: Bench, make: Make) -> None:
    producer = make()
    refs = {f"i{n}": producer.put(f"i{n}") for n in range(10)}
    for name, ref in refs.items():
        bench.puller.drop(bench.begin(name, ref))
    pending = bench.begin("later", None, where(producer))
    until(lambda: producer.server.waiting == 1)
    bench.puller.drop(pending)
    until(lambda: not bench.puller._tasks and bench.used == 0)
    producer.put("later")
    assert pending not in bench.reports
    until(lambda: bench.fetch("i0", refs["i0"]).refusal == "")


# --- an instance that is both ---


def test_the_own_pool_needs_no_network(make: Make) -> None:
    producer = make()
    bench = Bench(own=producer)
    try:
        ref = producer.put("i", picture(seed=5))
        producer.server.close()
        for given in (None, ref):
            report = bench.fetch("i", given)
            assert (report.refusal, report.producer) == ("", FACTS.producer)
            tensor = bench.puller.take(report.ticket)
            assert tensor is not None
            assert torch.equal(tensor, picture(seed=5))
        assert bench.fetch("i", None, rows=8).refusal == "wrong_shape"
        assert bench.fetch("j", None).refusal == "unknown"
        assert bench.used == 0
    finally:
        bench.close()


def test_an_error_of_the_pullers_own_is_one_items(bench: Bench, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    producer = make()
    ref = producer.put("i")
    with monkeypatch.context() as patch:
        patch.setattr(bench.puller._reader, "_unsound", lambda *_: 1 / 0)
        assert bench.fetch("i", ref).refusal == "read_failed"
    assert bench.puller.faults["fetch"] == 1
    assert bench.used == 0
    assert bench.fetch("i", ref).refusal == ""


def test_a_small_item_does_not_overtake_and_moves_up_when_a_large_one_gives_up(make: Make) -> None:
    bench = Bench(size=2 * 4096)
    producer = make()
    try:
        small, large = {"rows": 16, "width": 64}, {"rows": 32, "width": 128}
        first = bench.fetch("a", producer.put("a"), **small)
        assert first.refusal == ""
        waits = bench.begin("b", producer.put("b", picture(32, 128)), **large)
        until(lambda: bench.puller.room.waiting == 1)
        behind = bench.begin("c", producer.put("c"), **small)
        until(lambda: bench.puller.room.waiting == 2)  # there is room for it, and somebody before it
        bench.puller.drop(waits)
        assert bench.end(behind).refusal == ""
        assert bench.used == 2
    finally:
        bench.close()
