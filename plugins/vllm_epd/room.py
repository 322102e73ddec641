"""The receive pool of one rank: places for items that are on their way to the runner."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import torch

from vllm_epd.agent import Piece, Read, memory_kind
from vllm_epd.tiers import Run, Tier

BLOCK_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Region:
    """A place: its blocks, and offset and bytes of each piece."""

    runs: tuple[Run, ...]
    pieces: tuple[tuple[int, int], ...]


class Room:
    """Places in a slab, given in the order of the requests for them.

    Everything but `read` belongs to the loop's thread.

    Args:
        slab: ``[bytes]`` uint8, registered with NIXL.
        faults: counts what went wrong.

    Attributes:
        memory, device: NIXL's kind of the slab's memory, and its device index.
    """

    def __init__(self, slab: torch.Tensor, loop: asyncio.AbstractEventLoop, faults: Counter[str]) -> None:
        self._tier = Tier("receive", slab, BLOCK_BYTES)
        self._loop = loop
        self._faults = faults
        self._queue: deque[tuple[int, asyncio.Future[Region]]] = deque()
        self._stuck: list[tuple[Read, Region]] = []
        self.memory, self.device = memory_kind(slab), self._tier.device

    @property
    def capacity_bytes(self) -> int:
        return self._tier.capacity_bytes

    @property
    def used_blocks(self) -> int:
        return self._tier.holes.count - self._tier.holes.free

    @property
    def waiting(self) -> int:
        """Requests for a place that have none yet."""
        return len(self._queue)

    def addresses(self, region: Region) -> list[Piece]:
        """Address and bytes of each piece."""
        return [(self._tier.base + offset, size) for offset, size in region.pieces]

    def read(self, region: Region) -> torch.Tensor:
        """The bytes of a place, ``[size]`` uint8: a view where it is one piece, else a copy."""
        return self._tier.read(region.pieces)

    def try_take(self, size: int) -> Region | None:
        """A place for ``size`` bytes, if there is one now and nobody else waits."""
        if self._queue:
            return None
        runs = self._tier.holes.take(self._tier.blocks_for(size))
        return None if runs is None else Region(runs, self._tier.pieces(runs, size))

    async def take(self, size: int, timeout_s: float) -> Region | None:
        """A place for ``size`` bytes; None where the pool stays full."""
        region = self.try_take(size)
        if region is not None:
            return region
        turn: asyncio.Future[Region] = self._loop.create_future()
        entry = (size, turn)
        self._queue.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                return await turn
        except TimeoutError:
            return None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give(turn.result())
            raise
        finally:
            if entry in self._queue:
                self._queue.remove(entry)
                self._next_in_line()

    def _next_in_line(self) -> None:
        while self._queue:
            size, turn = self._queue[0]
            runs = self._tier.holes.take(self._tier.blocks_for(size))
            if runs is None:
                return
            self._queue.popleft()
            region = Region(runs, self._tier.pieces(runs, size))
            if turn.done():
                self._tier.holes.give(runs)  # it gave up in the same turn of the loop
            else:
                turn.set_result(region)

    def give(self, region: Region) -> None:
        """The place is free again."""
        if any(region is stuck for _, stuck in self._stuck):
            return  # NIXL may still write there
        self._tier.holes.give(region.runs)
        self._next_in_line()

    def reuse(self, region: Region, event: Any) -> None:
        """Give a region back once the copy out of it has run."""
        if event is not None and not event.query():
            self._loop.call_later(0.001, self.reuse, region, event)
        else:
            self.give(region)

    def keep_away(self, read: Read, region: Region) -> None:
        """NIXL may still write there: the place is not given again before it has let go."""
        self._faults["stuck_read"] += 1
        self._stuck.append((read, region))
        self._loop.call_later(1.0, self._try_again)

    def _try_again(self) -> None:
        tried, self._stuck = self._stuck, [stuck for stuck in self._stuck if not stuck[0].cancel()]
        for region in {id(region): region for _, region in tried}.values():
            self.give(region)  # unless another read may still write there
        if self._stuck:
            self._loop.call_later(1.0, self._try_again)
