"""Fetches of an item that several producers hold in slices: one place, each slice read to where its rows belong."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from vllm_epd.claiming import Claimed
from vllm_epd.messages import Fetch
from vllm_epd.peers import Peer
from vllm_epd.room import Region, Room
from vllm_suite.encoded import Granted
from vllm_suite.handoff import Refusal

T = TypeVar("T")
Claim = Callable[[Fetch], Awaitable[Claimed | Refusal]]
Bring = Callable[[Fetch, Peer, Granted, Region, Region], Awaitable[Refusal | None]]


@dataclass(frozen=True, slots=True)
class Joined:
    """An item that is whole: its place, bytes by producer, and when its transfer began."""

    region: Region
    shares: Counter[str]
    begun: float


@dataclass(slots=True)
class _Slice:
    """One slice: as an order of its own, and for one that was waited for, who has it and the grant until it is used.

    ``at`` is when it was granted.
    """

    order: Fetch
    peer: Peer | None = None
    granted: Granted | None = None
    at: float = 0.0

    def take_grant(self) -> Granted | None:
        """The grant, if the pin outlasts a read: with the seconds that are left of it."""
        granted, left = self.granted, 0.0
        if granted is not None:
            left = granted.hold_s - (time.monotonic() - self.at)
        if granted is None or left < granted.hold_s / 2:
            return None
        self.granted = None
        return msgspec.structs.replace(granted, hold_s=left)

    def release(self) -> None:
        """End the claim of a grant that is not used."""
        if self.peer is not None and self.granted is not None:
            self.peer.release(self.granted, ok=True)
            self.granted = None


class _Failed(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal


class SliceFetches:
    """Fetches items in slices; everything runs in the loop's thread.

    A slice that is still being made is claimed with no word of its rows, which its producer knows first. Nothing is
    read before all rows are known and make up the item.

    Args:
        claim: pins one slice, waiting for it where it is not made yet.
        bring: reads a granted slice into a region that is part of another, checks it, and ends the claim.
    """

    def __init__(self, room: Room, claim: Claim, bring: Bring) -> None:
        self._room = room
        self._claim = claim
        self._bring = bring

    async def fetch(self, order: Fetch, row_bytes: int) -> Joined | Refusal:
        """The whole item, or why it cannot be had; the first failure ends the rest."""
        slices = [_Slice(_part(order, index)) for index in range(len(order.slices))]
        region = None
        try:
            await _side_by_side(self._find(one) for one in slices if one.order.pending is not None)
            begun = time.monotonic()
            rows = sum(one.order.rows for one in slices)
            if rows != order.rows:
                return Refusal.TRUNCATED if rows < order.rows else Refusal.WRONG_SHAPE
            region = await self._room.take(rows * row_bytes, order.fetch_s)
            if region is None:
                return Refusal.NO_ROOM
            shares: Counter[str] = Counter()
            reads, at = [], 0
            for one in slices:
                size = one.order.rows * row_bytes
                reads.append(self._read(one, _within(region, at, size), region, size, shares))
                at += size
            await _side_by_side(reads)
            joined, region = Joined(region, shares, begun), None
            return joined
        except* _Failed as failed:
            refusal = _first(failed)
        finally:
            for one in slices:
                one.release()
            if region is not None:
                self._room.give(region)
        return refusal

    async def _find(self, one: _Slice) -> None:
        """Wait until a slice is made, and learn its rows."""
        one.peer, one.granted = _or_fail(await self._claim(one.order))
        one.at = time.monotonic()
        one.order = msgspec.structs.replace(one.order, rows=one.granted.rows)

    async def _read(self, one: _Slice, region: Region, whole: Region, size: int, shares: Counter[str]) -> None:
        peer, granted = one.peer, one.take_grant()
        if peer is not None and granted is None:
            one.release()
            again = await peer.claim(one.order.identifier, None, one.order.rows, 0.0)
            granted = _or_fail(again)
        if peer is None or granted is None:
            peer, granted = _or_fail(await self._claim(one.order))
        refusal = await self._bring(one.order, peer, granted, region, whole)
        if refusal is not None:
            raise _Failed(refusal)
        shares[peer.place.producer] += size


def _or_fail(answer: T | Refusal) -> T:
    if isinstance(answer, Refusal):
        raise _Failed(answer)
    return answer


def _part(order: Fetch, index: int) -> Fetch:
    source = order.slices[index]
    return msgspec.structs.replace(
        order,
        identifier=source.identifier,
        ref=source.ref,
        pending=source.pending,
        rows=source.ref.tokens if source.ref is not None else 1,
        slices=(),
    )


def _within(region: Region, start: int, size: int) -> Region:
    """The bytes of a region from ``start`` on."""
    pieces = []
    for offset, length in region.pieces:
        skipped = min(start, length)
        taken = min(length - skipped, size)
        if taken:
            pieces.append((offset + skipped, taken))
        start, size = start - skipped, size - taken
    return Region((), tuple(pieces))


async def _side_by_side(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    async with asyncio.TaskGroup() as group:
        for work in works:
            group.create_task(work)


def _first(failed: BaseExceptionGroup[_Failed]) -> Refusal:
    one: BaseException = failed
    while isinstance(one, BaseExceptionGroup):
        one = one.exceptions[0]
    assert isinstance(one, _Failed)
    return one.refusal
