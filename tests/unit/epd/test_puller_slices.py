"""Items in slices, fetched over real TCP and NIXL from two producers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.epd.producers import FACTS, LocalProducer, picture
from tests.unit.epd.test_puller import CONFIG, ITEM_BYTES, ROWS, WIDTH, Bench, until, where
from vllm_epd.item_server import Facts
from vllm_epd.messages import Fetched, SliceSource
from vllm_suite.encoded import Pending, slice_identifier
from vllm_suite.handoff import Handoff

CUTS = ((0, 5), (5, 9), (9, ROWS))


def named(index: int) -> str:
    return slice_identifier("i", index, len(CUTS))


class Trio:
    """A bench, two producers, and an item whose slices lie there in turn."""

    def __init__(self, **bench: Any) -> None:
        self.bench = Bench(**bench)
        self.producers = [LocalProducer(facts=Facts(name, "epoch", FACTS.model, FACTS.layout)) for name in ("a", "b")]
        self.item = picture(seed=1)

    def at(self, index: int) -> LocalProducer:
        return self.producers[index % 2]

    def put(self, index: int, tensor: torch.Tensor | None = None) -> Handoff:
        start, stop = CUTS[index]
        return self.at(index).put(named(index), self.item[start:stop] if tensor is None else tensor)

    def ref(self, index: int, tensor: torch.Tensor | None = None) -> SliceSource:
        return SliceSource(named(index), self.put(index, tensor), None)

    def pending(self, index: int, *others: LocalProducer) -> SliceSource:
        places = tuple(where(one) for one in (*others, self.at(index)))
        return SliceSource(named(index), None, Pending(identifier=named(index), candidates=places, wait_s=10.0))

    def begin(self, *slices: SliceSource) -> int:
        return self.bench.begin("i", None, slices=slices, wait_s=10.0)

    def fetch(self, *slices: SliceSource) -> Fetched:
        return self.bench.end(self.begin(*slices))

    def idle(self) -> bool:
        """No claim is left open, and no place taken."""
        return not any(one.pool.take_stats().pins for one in self.producers) and self.bench.used == 0

    def close(self) -> None:
        self.bench.close()
        for one in self.producers:
            one.close()


@pytest.fixture
def trio() -> Iterator[Trio]:
    made = Trio()
    yield made
    made.close()


def arrived(trio: Trio, report: Fetched) -> None:
    assert (report.refusal, report.size) == ("", ITEM_BYTES)
    assert report.shares == {"a": (5 + 7) * WIDTH * 2, "b": 4 * WIDTH * 2}
    tensor = trio.bench.puller.take(report.ticket)
    assert tensor is not None
    assert torch.equal(tensor, trio.item)
    until(trio.idle)


def test_slices_of_two_producers_become_one_item(trio: Trio) -> None:
    arrived(trio, trio.fetch(*(trio.ref(index) for index in range(3))))


def test_slices_that_are_still_being_made(trio: Trio) -> None:
    ticket = trio.begin(trio.pending(0), trio.pending(1), trio.pending(2))
    for index in (2, 0, 1):
        assert ticket not in trio.bench.reports
        trio.put(index)
    arrived(trio, trio.bench.end(ticket))


def test_some_made_and_some_not(trio: Trio) -> None:
    ticket = trio.begin(trio.ref(0), trio.pending(1), trio.ref(2))
    until(lambda: trio.at(1).server.waiting == 1)
    trio.put(1)
    arrived(trio, trio.bench.end(ticket))


def test_a_slice_is_asked_for_at_another_encoder(trio: Trio) -> None:
    """The first one that was to make it has made nothing, and says so when its request is given up."""
    ticket = trio.begin(trio.ref(0), trio.pending(1, trio.producers[0]), trio.ref(2))
    until(lambda: trio.producers[0].server.waiting == 1)
    trio.producers[0].pool.announce_failure(named(1), "not_stored")  # type: ignore[arg-type]
    trio.put(1)
    arrived(trio, trio.bench.end(ticket))


def test_pins_that_would_lapse_are_taken_anew() -> None:
    trio = Trio(config=CONFIG.model_copy(update={"hold_s": 0.2, "read_timeout_s": 0.2}))
    try:
        ticket = trio.begin(trio.pending(0), trio.pending(1), trio.pending(2))
        trio.put(0)
        trio.put(1)
        until(lambda: trio.at(0).server.take_counts().granted >= 1)
        until(lambda: trio.at(0).pool.take_stats().expired_pins + trio.at(1).pool.take_stats().expired_pins >= 1)
        trio.put(2)
        arrived(trio, trio.bench.end(ticket))
    finally:
        trio.close()


def test_an_item_in_a_scattered_pool() -> None:
    """The places of slices begin and end within the pieces of the item's place."""
    trio = Trio(size=4 * 4096)
    rows, width = 16, 256  # two blocks
    try:
        small = [
            trio.bench.fetch(f"s{n}", trio.at(n).put(f"s{n}", picture(8, 256, n)), rows=8, width=256) for n in range(4)
        ]
        for n in (0, 2):
            trio.bench.puller.drop(small[n].ticket)
        until(lambda: trio.bench.used == 2)
        item = picture(rows, width, 9)
        sources = [SliceSource(named(n), trio.at(n).put(named(n), item[a:b]), None) for n, (a, b) in enumerate(CUTS)]
        report = trio.bench.end(trio.bench.begin("i", None, slices=tuple(sources), rows=rows, width=width))
        assert report.refusal == ""
        tensor = trio.bench.puller.take(report.ticket)
        assert tensor is not None
        assert torch.equal(tensor, item)
    finally:
        trio.close()


def flip(producer: LocalProducer, identifier: str) -> None:
    item = producer.pool._shelves.find(identifier)
    assert item is not None
    producer.slab[item.stored.runs[0][0]] ^= 1


def poison(producer: LocalProducer, identifier: str) -> None:
    item = producer.pool._shelves.find(identifier)
    assert item is not None
    item.stored = replace(item.stored, width=WIDTH + 1)


def test_every_slice_is_checked_like_an_item(trio: Trio) -> None:
    for fault, reason in ((flip, "bad_checksum"), (poison, "wrong_shape")):
        for index in range(3):
            slices = [trio.ref(one) for one in range(3)]
            fault(trio.at(index), named(index))
            assert trio.fetch(*slices).refusal == reason
            until(trio.idle)
            for one in range(3):
                trio.at(one).pool.drop(named(one))


def test_not_a_number_in_one_slice(trio: Trio) -> None:
    bad = trio.item[5:9].clone()
    bad[2, 3] = float("nan")
    refused = trio.at(1).pool.put(named(1), bad)
    assert str(refused) == "non_finite"  # a producer of ours does not even store it
    assert trio.fetch(trio.ref(0), trio.pending(1), trio.ref(2)).refusal == "non_finite"
    until(trio.idle)


@pytest.mark.parametrize("index", range(3))
def test_a_slice_that_is_gone_ends_the_fetch(trio: Trio, index: int) -> None:
    slices = [trio.ref(one) for one in range(3)]
    trio.at(index).pool.drop(named(index))
    assert trio.fetch(*slices).refusal == "expired"
    until(trio.idle)


@pytest.mark.parametrize(("rows", "reason"), [(3, "truncated"), (5, "wrong_shape")])
def test_the_rows_of_slices_under_way_must_make_up_the_item(trio: Trio, rows: int, reason: str) -> None:
    ticket = trio.begin(trio.pending(0), trio.pending(1), trio.pending(2))
    for index in (0, 2):
        trio.put(index)
    trio.put(1, picture(rows, WIDTH, 3))
    assert trio.bench.end(ticket).refusal == reason
    until(trio.idle)


def test_a_dead_producer_costs_its_item_and_no_place(trio: Trio) -> None:
    slices = [trio.ref(one) for one in range(3)]
    trio.producers[1].server.close()
    assert trio.fetch(*slices).refusal in ("peer_dead", "claim_timeout")
    until(lambda: trio.bench.used == 0)


def test_a_fetch_that_is_dropped_in_the_middle(trio: Trio) -> None:
    ticket = trio.begin(trio.ref(0), trio.pending(1), trio.ref(2))
    until(lambda: trio.at(1).server.waiting == 1)
    trio.bench.puller.drop(ticket)
    until(lambda: not trio.bench.puller._tasks)
    until(trio.idle)
    assert ticket not in trio.bench.reports


def test_slices_larger_than_the_pool(trio: Trio) -> None:
    slices = tuple(trio.ref(one) for one in range(3))
    report = trio.bench.end(trio.bench.begin("i", None, slices=slices, rows=1 << 20))
    assert report.refusal == "too_large"
