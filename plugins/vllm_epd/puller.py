"""Fetches items into this worker's receive pool: claim over TCP, read by NIXL, verify.

Orders come from the link's thread, the work is done in an event loop's thread, and the runner's thread takes what is
ready. An order always ends in exactly one report, unless it was dropped.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_epd.agent import Agent
from vllm_epd.claiming import Claims
from vllm_epd.config import EpdConfig
from vllm_epd.messages import Fetch, Fetched
from vllm_epd.peers import Me, Peers
from vllm_epd.pool import DTYPES, Pool
from vllm_epd.reading import Reader
from vllm_epd.room import Region, Room
from vllm_epd.slices import SliceFetches
from vllm_suite.encoded import Where
from vllm_suite.handoff import Refusal
from vllm_suite.loop_thread import LoopThread

logger = logging.getLogger("vllm.suite.epd")

# Past the deadlines of its parts a whole fetch is given up.
GRACE_S = 0.5


@dataclass(frozen=True, slots=True)
class Ready:
    """An item that waits for the runner, in the receive pool or (``values``) out of the own pool."""

    region: Region | None
    values: torch.Tensor | None
    rows: int
    width: int


class Puller:
    """One rank's fetches.

    Args:
        slab: ``[bytes]`` uint8 on the runner's device, registered with ``agent``.
        dtype: torch's name of the model's type without the prefix.
        report: called with the end of each fetch, from the loop's thread.
        own: this instance's own pool and its place, where it is a producer too.
    """

    def __init__(
        self,
        config: EpdConfig,
        thread: LoopThread,
        agent: Agent,
        slab: torch.Tensor,
        dtype: str,
        me: Me,
        report: Callable[[Fetched], None],
        own: tuple[Pool, Where] | None = None,
    ) -> None:
        self._loop = thread.loop
        self._dtype = dtype
        self._itemsize = DTYPES[dtype].itemsize
        self._report = report
        self._own = own
        self._peers = Peers(config, me, agent)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ready: dict[int, Ready] = {}
        self._lock = threading.Lock()
        self.faults: Counter[str] = Counter()
        self.room = Room(slab, thread.loop, self.faults)
        self._claims = Claims(self._peers)
        self._reader = Reader(config, agent, self.room, dtype)
        self._slices = SliceFetches(self.room, self._claims.claim, self._reader.bring)

    # --- other threads ---

    def fetch(self, order: Fetch) -> None:
        """Begin; the answer goes to ``report``."""
        self._loop.call_soon_threadsafe(self._start, order)

    def drop(self, ticket: int) -> None:
        """Stop a fetch, or throw away what it has brought."""
        self._loop.call_soon_threadsafe(self._drop, ticket)

    def take(self, ticket: int) -> torch.Tensor | None:
        """The item as a tensor of its own, ``[rows, width]`` on the runner's device. None where there is none."""
        with self._lock:
            ready = self._ready.pop(ticket, None)
        if ready is None:
            return None
        if ready.region is None:
            return ready.values
        data = self.room.read(ready.region)
        if len(ready.region.pieces) == 1:
            data = data.clone()
        event = None
        if data.device.type != "cpu":
            event = torch.Event(data.device)
            event.record()
        self._loop.call_soon_threadsafe(self.room.reuse, ready.region, event)
        return data.view(DTYPES[self._dtype]).view(ready.rows, ready.width)

    def take_faults(self) -> dict[str, int]:
        """Contained faults since the last call. Called in the loop's thread and between steps."""
        faults = dict(self.faults)
        self.faults.subtract(faults)
        return {fault: amount for fault, amount in faults.items() if amount}

    def close(self) -> None:
        """Stop every fetch. The loop's thread is stopped by its owner."""
        self._loop.call_soon_threadsafe(self._close)

    # --- the loop's thread ---

    def _close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._peers.close()

    def _start(self, order: Fetch) -> None:
        task = self._loop.create_task(self._run(order))
        self._tasks[order.ticket] = task
        task.add_done_callback(lambda _: self._tasks.pop(order.ticket, None))

    def _drop(self, ticket: int) -> None:
        task = self._tasks.get(ticket)
        if task is not None:
            task.cancel()
        with self._lock:
            ready = self._ready.pop(ticket, None)
        if ready is not None and ready.region is not None:
            self.room.give(ready.region)

    async def _run(self, order: Fetch) -> None:
        begun = time.monotonic()
        producer = order.ref.producer if order.ref is not None else ""
        try:
            async with asyncio.timeout(order.wait_s + order.fetch_s + GRACE_S):
                outcome = await self._fetch(order)
        except TimeoutError:
            outcome = Refusal.READ_FAILED
        except Exception:
            logger.exception("epd: fetching %s failed", order.identifier)
            self.faults["fetch"] += 1
            outcome = Refusal.READ_FAILED
        if isinstance(outcome, Refusal):
            self._report(Fetched(order.ticket, outcome.value, 0, time.monotonic() - begun, producer))
            return
        ready, shares, begun = outcome
        with self._lock:
            self._ready[order.ticket] = ready
        size = order.rows * order.width * self._itemsize
        producer = next(iter(shares))
        seconds = time.monotonic() - begun
        self._report(Fetched(order.ticket, "", size, seconds, producer, shares if order.slices else {}))

    async def _fetch(self, order: Fetch) -> tuple[Ready, dict[str, int], float] | Refusal:
        """The item, bytes by who made them, and when its transfer began."""
        size = order.rows * order.width * self._itemsize
        begun = time.monotonic()
        if self._is_own(order):
            return self._from_own(order, begun)
        if size > self.room.capacity_bytes:
            return Refusal.TOO_LARGE
        if order.slices:
            joined = await self._slices.fetch(order, order.width * self._itemsize)
            if isinstance(joined, Refusal):
                return joined
            return Ready(joined.region, None, order.rows, order.width), joined.shares, joined.begun
        region = None
        if order.pending is None:
            region = await self.room.take(size, order.fetch_s)
            if region is None:
                return Refusal.NO_ROOM
        try:
            claimed = await self._claims.claim(order)
            if isinstance(claimed, Refusal):
                return claimed
            peer, granted = claimed
            if order.pending is not None:
                begun = time.monotonic()
                region = self.room.try_take(size)
            if region is None:
                # The pin would not outlast a long wait for room.
                peer.release(granted, ok=True)
                region = await self.room.take(size, order.fetch_s)
                again = await peer.claim(order.identifier, order.ref, order.rows, 0.0) if region else Refusal.NO_ROOM
                if isinstance(again, Refusal):
                    return again
                granted = again
            assert region is not None
            refusal = await self._reader.bring(order, peer, granted, region)
            if refusal is not None:
                return refusal
            ready, region = Ready(region, None, order.rows, order.width), None
            return ready, {peer.place.producer: size}, begun
        finally:
            if region is not None:
                self.room.give(region)

    def _is_own(self, order: Fetch) -> bool:
        if self._own is None:
            return False
        if order.ref is None and order.pending is None and not order.slices:
            return True
        ref, place = order.ref, self._own[1]
        return ref is not None and (ref.producer, ref.epoch) == (place.producer, place.epoch)

    def _from_own(self, order: Fetch, begun: float) -> tuple[Ready, dict[str, int], float] | Refusal:
        assert self._own is not None
        pool, place = self._own
        values = pool.load(order.identifier)
        if values is None:
            return Refusal.EXPIRED if order.ref is not None else Refusal.UNKNOWN
        if tuple(values.shape) != (order.rows, order.width) or values.dtype != DTYPES[self._dtype]:
            return Refusal.WRONG_SHAPE
        return Ready(None, values, order.rows, order.width), {place.producer: values.nbytes}, begun
