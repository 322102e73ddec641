"""What a pool keeps, for whom, in which tier, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.epd.pools import BLOCK, LEASE_S, Clock, bytes_of, claim, make, put, values
from vllm_epd.checksum import checksum
from vllm_epd.pool import Stored
from vllm_suite.handoff import Refusal


@pytest.fixture
def clock() -> Clock:
    return Clock()


# --- what is stored ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 3), (7, 33), (64, 5), (5, 64)])
def test_any_float_of_any_width_comes_back_as_it_was(clock: Clock, dtype: torch.dtype, rows: int, width: int) -> None:
    pool = make(clock, 16)
    tensor = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    stored = pool.put("a", tensor)
    assert isinstance(stored, Stored)
    assert (stored.rows, stored.width, stored.dtype) == (rows, width, str(dtype).removeprefix("torch."))
    assert stored.size == rows * width * dtype.itemsize == sum(size for _, size in stored.runs)
    assert stored.checksum == checksum(tensor, stored.seed) == checksum(bytes_of(pool, stored), stored.seed)
    assert pool.get("a") == stored
    loaded = pool.load("a")
    assert loaded is not None
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    assert stored.addresses() == tuple((stored.base + at, size) for at, size in stored.runs)


def test_what_was_put_may_change_afterwards(clock: Clock) -> None:
    pool, tensor = make(clock), values()
    stored = pool.put("a", tensor)
    assert isinstance(stored, Stored)
    before = tensor.clone()
    tensor.zero_()
    loaded = pool.load("a")
    assert loaded is not None
    assert torch.equal(loaded, before)
    loaded.zero_()
    assert checksum(bytes_of(pool, stored), stored.seed) == stored.checksum, "a loaded item is a copy"


def test_tensors_that_are_views_and_need_gradients(clock: Clock) -> None:
    pool = make(clock, 16)
    base = torch.randn(16, 24, requires_grad=True)
    for name, view in (("columns", base[:, 3:11]), ("transposed", base[:8, :8].t()), ("rows", base[2:10, :8])):
        assert isinstance(pool.put(name, view), Stored)
        loaded = pool.load(name)
        assert loaded is not None
        assert torch.equal(loaded, view.detach())


@pytest.mark.parametrize(
    ("tensor", "refusal"),
    [
        (torch.zeros(4), Refusal.WRONG_SHAPE),
        (torch.zeros(2, 2, 2), Refusal.WRONG_SHAPE),
        (torch.zeros(0, 8), Refusal.WRONG_SHAPE),
        (torch.zeros(8, 0), Refusal.WRONG_SHAPE),
        (torch.tensor(1.0), Refusal.WRONG_SHAPE),
        (torch.zeros(4, 4, dtype=torch.int32), Refusal.WRONG_SHAPE),
        (torch.zeros(4, 4, dtype=torch.float64), Refusal.WRONG_SHAPE),
        (torch.full((4, 4), float("nan")), Refusal.NON_FINITE),
        (torch.tensor([[1.0, float("inf")]]), Refusal.NON_FINITE),
        (torch.tensor([[1.0, float("-inf")]], dtype=torch.bfloat16), Refusal.NON_FINITE),
        (torch.zeros(9 * BLOCK // 4, 1), Refusal.TOO_LARGE),
    ],
)
def test_what_is_no_item_is_refused_and_costs_nobody_his(clock: Clock, tensor: torch.Tensor, refusal: Refusal) -> None:
    pool, heard = make(clock), []
    put(pool, "old", 8)
    clock.now += LEASE_S
    pool.subscribe(lambda identifier, why: heard.append((identifier, why)))
    assert pool.put("bad", tensor) is refusal
    assert heard == [("bad", refusal)]
    assert pool.contains("old")
    assert not pool.contains("bad")
    assert pool.take_stats().not_stored == {refusal.value: 1}


def test_an_item_as_large_as_the_pool_fits(clock: Clock) -> None:
    pool = make(clock)
    put(pool, "small", 1)
    clock.now += LEASE_S
    assert len(put(pool, "whole", 8).runs) == 1
    assert not pool.contains("small")


def test_a_tensor_that_cannot_be_copied_is_refused_and_its_blocks_stay_free(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make(clock)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(pool._shelves.tiers[0], "write", fail)
        assert pool.put("a", values(8)) is Refusal.NOT_STORED
    assert pool.take_stats().used_bytes == {"device": 0}
    put(pool, "a", 8)


# --- who goes first ---


def test_the_least_recently_used_goes_first(clock: Clock) -> None:
    pool = make(clock, 4)
    for name in "abcd":
        put(pool, name)
    clock.now += LEASE_S
    pool.unpin(claim(pool, "a"))
    assert pool.keep("b", 0.0) is not None
    assert pool.load("c") is not None
    pool.get("d")
    assert pool.contains("d"), "looking is not using"
    put(pool, "e")
    assert [name for name in "abcde" if pool.contains(name)] == ["a", "b", "c", "e"]
    put(pool, "f", 2)
    assert [name for name in "abcef" if pool.contains(name)] == ["c", "e", "f"]
    assert pool.take_stats().evictions == {"device": 3}


def test_under_lease_only_what_has_been_read_goes(clock: Clock) -> None:
    pool = make(clock, 3)
    for name in "abc":
        put(pool, name)
    assert pool.put("d", values()) is Refusal.NOT_STORED
    pool.unpin(claim(pool, "c"), read=False)
    assert pool.put("d", values()) is Refusal.NOT_STORED, "a reader that gave up has not read"
    pool.unpin(claim(pool, "b"))
    put(pool, "d")
    assert [name for name in "abcd" if pool.contains(name)] == ["a", "c", "d"]


def test_what_has_no_lease_goes_before_what_was_read_under_lease(clock: Clock) -> None:
    pool = make(clock, 2)
    put(pool, "old")
    clock.now += LEASE_S
    put(pool, "new")
    pool.unpin(claim(pool, "new"))
    pool.unpin(claim(pool, "old"))  # used last
    put(pool, "next")
    assert pool.contains("new")
    assert not pool.contains("old")


def test_a_lease_is_renewed_by_keeping(clock: Clock) -> None:
    pool = make(clock, 1)
    first = put(pool, "a")
    pool.unpin(claim(pool, "a"))
    assert pool.keep("a", 1.0) == first
    clock.now += LEASE_S - 1
    assert pool.put("b", values()) is Refusal.NOT_STORED, "never shorter than it was, and unread again"
    assert pool.keep("a", 5.0) == first
    clock.now += 4.9
    assert pool.put("b", values()) is Refusal.NOT_STORED
    clock.now += 0.2
    put(pool, "b")
    assert pool.keep("a", 5.0) is None


def test_nothing_is_evicted_for_an_item_that_does_not_fit_anyway(clock: Clock) -> None:
    pool = make(clock, 4)
    for name in "abc":
        put(pool, name)
    pinned = claim(pool, "b", 100.0)
    clock.now += LEASE_S
    put(pool, "d")  # leased
    assert pool.put("large", values(3)) is Refusal.NOT_STORED
    assert all(pool.contains(name) for name in "abcd")
    pool.unpin(pinned)
    put(pool, "large", 3)
    assert [name for name in "abcd" if pool.contains(name)] == ["d"]


def test_a_pool_full_of_pinned_items_refuses_at_once(clock: Clock) -> None:
    pool = make(clock, 2)
    put(pool, "a"), put(pool, "b")
    clock.now += LEASE_S
    claim(pool, "a", 5.0), claim(pool, "b", 7.0)
    assert pool.put("c", values()) is Refusal.NOT_STORED
    clock.now += 5.0
    put(pool, "c")
    assert not pool.contains("a")
    assert pool.contains("b")
    assert pool.take_stats().expired_pins == 1


# --- fragmentation ---


def test_scattered_holes_hold_a_large_item(clock: Clock) -> None:
    pool = make(clock, 8)
    for at in range(8):
        put(pool, str(at))
    for at in (0, 2, 4, 6):
        pool.drop(str(at))
    stored = put(pool, "large", 4, seed=5)
    assert len(stored.runs) == 4
    loaded = pool.load("large")
    assert loaded is not None
    assert torch.equal(loaded, values(4, 5))
    assert pool.verify(claim(pool, "large"))


# --- the second tier ---


def test_what_the_first_tier_cannot_keep_goes_to_the_second(clock: Clock) -> None:
    pool = make(clock, 2, host_blocks=3)
    for at in range(4):
        put(pool, str(at), seed=at)
    found = [pool.get(str(at)) for at in range(4)]
    assert [stored.tier for stored in found if stored] == ["host", "host", "device", "device"]
    assert all(stored.memory == "DRAM" for stored in found if stored)
    for at in range(4):
        loaded = pool.load(str(at))
        assert loaded is not None
        assert torch.equal(loaded, values(1, at)), "moved with its bytes"
    stats = pool.take_stats()
    assert (stats.demotions, stats.evictions) == ({"device": 2}, {})
    assert stats.hits == {"device": 2, "host": 2}
    assert stats.items == {"device": 2, "host": 2}
    put(pool, "4")
    assert pool.put("5", values()) is Refusal.NOT_STORED, "all five are leased and unread"
    assert len(pool) == 5
    clock.now += LEASE_S
    put(pool, "5")
    stats = pool.take_stats()
    assert (stats.demotions, stats.evictions) == ({"device": 2}, {"host": 1})


def test_a_moved_item_keeps_its_publication_and_its_lease(clock: Clock) -> None:
    pool = make(clock, 1, host_blocks=1)
    first = put(pool, "a")
    clock.now += LEASE_S - 1
    put(pool, "b")
    moved = pool.get("a")
    assert moved is not None
    assert (moved.item_id, moved.seed, moved.checksum) == (first.item_id, first.seed, first.checksum)
    assert moved.base != first.base
    assert pool.verify(claim(pool, "a", 0.5))
    assert pool.put("c", values()) is Refusal.NOT_STORED
    clock.now += 1
    put(pool, "c")  # a is gone, b moves
    assert [name for name in "abc" if pool.contains(name)] == ["b", "c"]


def test_a_pinned_item_never_moves(clock: Clock) -> None:
    pool = make(clock, 1, host_blocks=2)
    first = put(pool, "a")
    number = claim(pool, "a")
    second = put(pool, "b")
    assert second.tier == "host", "it goes where there is room"
    assert pool.get("a") == first
    pool.unpin(number)
    assert put(pool, "c").tier == "device"
    moved = pool.get("a")
    assert moved is not None
    assert moved.tier == "host"


def test_an_item_larger_than_the_first_tier_goes_to_the_second(clock: Clock) -> None:
    pool = make(clock, 2, host_blocks=4)
    assert put(pool, "a", 3).tier == "host"
    assert pool.put("b", values(5)) is Refusal.TOO_LARGE


def test_what_need_not_stay_is_lost_before_what_must(clock: Clock) -> None:
    """The second tier has room for one: the unread item under lease goes there, not the one whose lease is over."""
    pool = make(clock, 2, host_blocks=1)
    put(pool, "old", seed=1)
    clock.now += LEASE_S
    put(pool, "new", seed=2)
    put(pool, "both", 2, seed=3)
    assert not pool.contains("old")
    kept = pool.get("new")
    assert kept is not None
    assert kept.tier == "host"
