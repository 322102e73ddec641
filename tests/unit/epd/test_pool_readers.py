"""Readers of a pool: publications, pins and their ends, corruption, several threads."""

from __future__ import annotations

import threading

import pytest

from tests.unit.epd.pools import BLOCK, LEASE_S, Clock, bytes_of, claim, make, put, values
from vllm_epd.checksum import checksum
from vllm_epd.pins import SWEEP_EVERY
from vllm_epd.pool import Pool, Stored
from vllm_epd.tiers import new_slab
from vllm_suite.handoff import Refusal


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- publications, pins ---


def test_each_publication_has_an_id_of_its_own(clock: Clock) -> None:
    pool = make(clock, 4)
    first, second = put(pool, "a"), put(pool, "b")
    again = put(pool, "a", seed=1)
    assert len({first.item_id, second.item_id, again.item_id}) == 3
    assert again.seed != first.seed
    assert pool.get("a") == again
    assert len(pool) == 2
    for known in (first, second, again):
        assert pool.has_published(known.item_id)
    for unknown in (
        "item-4",
        "item-0",
        "item-01",
        "item--1",
        "item-",
        "item-x",
        "item-²",
        "item- 1",
        "1",
        "",
        "ITEM-1",
    ):
        assert not pool.has_published(unknown)
    assert not pool.has_published("item-" + "9" * 5000)


def test_a_reader_keeps_what_it_pinned_when_the_item_is_published_anew(clock: Clock) -> None:
    pool = make(clock, 2)
    old = put(pool, "a", seed=1)
    number = claim(pool, "a")
    new = put(pool, "a", seed=2)
    assert pool.pinned(number) == old
    assert not set(old.runs) & set(new.runs)
    assert checksum(bytes_of(pool, old), old.seed) == old.checksum
    assert pool.put("b", values()) is Refusal.NOT_STORED, "the old one still takes its block"
    assert pool.unpin(number)
    put(pool, "b")
    assert pool.get("a") == new


def test_a_dropped_item_lives_as_long_as_its_readers(clock: Clock) -> None:
    pool = make(clock, 1)
    old = put(pool, "a", seed=1)
    one, two = claim(pool, "a"), claim(pool, "a", 8.0)
    assert pool.drop("a")
    assert not pool.drop("a")
    assert not pool.contains("a")
    assert pool.pin("a", 1.0) is Refusal.UNKNOWN
    assert pool.unpin(one)
    assert pool.put("b", values()) is Refusal.NOT_STORED
    assert checksum(bytes_of(pool, old), old.seed) == old.checksum
    clock.now += 8.0
    assert pool.expire() == 1
    put(pool, "b")
    assert not pool.unpin(two)
    assert pool.pinned(two) is None


def test_claims_are_shared_and_each_ends_once(clock: Clock) -> None:
    pool = make(clock, 1)
    put(pool, "a")
    claims = [claim(pool, "a") for _ in range(50)]
    assert len(set(claims)) == 50
    clock.now += LEASE_S / 4
    for number in claims:
        assert pool.unpin(number)
        assert not pool.unpin(number)
    assert not pool.unpin(10**9)
    stats = pool.take_stats()
    assert (stats.pins, stats.hits, stats.expired_pins) == (0, {"device": 50}, 0)


def test_what_consumers_were_promised(clock: Clock) -> None:
    """An item is owed until one of them has read it or its lease ends; who asks for it anew is promised it anew."""
    pool = make(clock)

    def owed() -> tuple[int, int]:
        stats = pool.take_stats()
        return stats.unread, stats.pins

    put(pool, "a"), put(pool, "b")
    assert owed() == (2, 0)
    number = claim(pool, "a")
    assert owed() == (1, 1)
    pool.unpin(number, read=False)
    assert owed() == (2, 0)
    pool.unpin(claim(pool, "a"))
    assert owed() == (1, 0)
    assert pool.keep("a", LEASE_S)
    assert owed() == (2, 0)
    pool.drop("a")
    clock.now += LEASE_S
    assert owed() == (0, 0)


def test_readers_that_never_say_goodbye_do_not_add_up(clock: Clock) -> None:
    pool = make(clock, 1)
    put(pool, "a")
    for _ in range(10 * SWEEP_EVERY):
        claim(pool, "a", 1.0)
        clock.now += 0.1
    assert len(pool._pins) <= SWEEP_EVERY + 10
    assert len(pool._pins) == sum(len(item.pins) for item in pool._shelves._items["device"].values())


# --- corruption ---


def test_a_corrupt_item_is_found_and_dropped(clock: Clock) -> None:
    pool = make(clock, 4)
    stored = put(pool, "a", 2, seed=3)
    number = claim(pool, "a")
    assert pool.verify(number)
    pool._shelves.tiers[0].slab[stored.runs[0][0] + 17] ^= 1
    assert not pool.verify(number)
    assert not pool.contains("a")
    assert pool.take_stats().corrupt == 1
    assert pool.unpin(number)
    assert pool.take_stats().used_bytes == {"device": 0}


def test_a_corrupt_item_is_not_loaded(clock: Clock) -> None:
    pool = make(clock, 4)
    stored = put(pool, "a", 2, seed=3)
    pool._shelves.tiers[0].slab[stored.runs[0][0]] ^= 128
    assert pool.load("a") is None
    assert not pool.contains("a")
    assert pool.load("a") is None
    stats = pool.take_stats()
    assert (stats.corrupt, stats.misses, stats.pins, stats.used_bytes) == (1, 1, 0, {"device": 0})
    assert pool.verify(10**6), "nothing is wrong with an item that is not there"


# --- several threads ---


def test_waiting_ears_hear_of_every_end(clock: Clock) -> None:
    pool, heard = make(clock, 2), []
    pool.subscribe(lambda identifier, why: heard.append((identifier, why, pool.contains(identifier))))
    put(pool, "a")
    pool.announce_failure("b", Refusal.ABANDONED)
    assert heard == [("a", None, True), ("b", Refusal.ABANDONED, False)]


def test_one_thread_stores_while_others_read() -> None:
    """Real time and real races: what a claim pins is whole for as long as it is pinned."""
    pool = Pool(new_slab(32 * BLOCK), BLOCK, 0.0)
    over, wrong, reads = threading.Event(), [], [0, 0, 0]

    def read(reader: int) -> None:
        at = 0
        while not over.is_set():
            at += 1
            claimed = pool.claim(str(at % 24), 5.0)
            if claimed is not None:
                number, stored = claimed
                if checksum(bytes_of(pool, stored), stored.seed) != stored.checksum:
                    wrong.append(stored.identifier)
                reads[reader] += 1
                pool.unpin(number)

    threads = [threading.Thread(target=read, args=(reader,)) for reader in range(3)]
    for thread in threads:
        thread.start()
    try:
        for at in range(600):
            outcome = pool.put(str(at % 24), values(1 + at % 5, seed=at))
            assert isinstance(outcome, Stored) or outcome is Refusal.NOT_STORED
    finally:
        over.set()
        for thread in threads:
            thread.join(30)
    assert not wrong
    assert all(reads), reads
    for identifier in range(24):
        pool.drop(str(identifier))
    stats = pool.take_stats()
    assert (stats.pins, stats.corrupt, stats.used_bytes) == (0, 0, {"device": 0})
