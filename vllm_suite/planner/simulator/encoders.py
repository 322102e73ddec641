"""Encode instances: batches of items, one after another, and the cache of what came out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from vllm_suite.planner.simulator.clock import Clock, Kind
from vllm_suite.planner.simulator.routing import Member
from vllm_suite.planner.simulator.token_cache import Key, TokenCache


@dataclass(slots=True, eq=False)
class Piece:
    """An item or a slice of one, for one encoder."""

    making: Making
    seconds: float
    tokens: int
    size: float
    since: float


@dataclass(eq=False)
class Making:
    """An item that is being encoded, for all who wait for it."""

    key: Key
    left: int
    waiting: list[Waiter] = field(default_factory=list)
    start: float = float("inf")
    kept: list[tuple[Encoder, float]] = field(default_factory=list)


@dataclass(eq=False)
class Waiter:
    """A request at the encode stage.

    Attributes:
        left: items that are not there yet.
        start, end: when the first of its items was begun, and when the last one was there.
        keys: of its items, in their order.
        sources: encoder, bytes and key of everything that it has to fetch.
        landed: called with the time whenever there is more of that.
    """

    left: int
    done: Callable[[float], None]
    start: float = float("inf")
    end: float = 0.0
    landed: Callable[[float], None] | None = None
    keys: list[Key] = field(default_factory=list)
    sources: list[tuple[Encoder, float, Key]] = field(default_factory=list)


@runtime_checkable
class EncodeObserver(Protocol):
    """An `Observer` that sees batches of encoders too."""

    def encoded(self, encoder: Encoder, start: float, end: float, items: int) -> None:
        """A batch of so many items and slices ended."""
        ...


@dataclass(eq=False)
class Encoder(Member):
    """One encode instance: batches of at most `max_items`, first come, first served; its outputs come together.

    A batch takes the sum of its items' times: encoders are bound by operations, so items side by side win nothing.

    Attributes:
        busy, steps: seconds in batches, and batches.
        encoded, hits: items and slices that were encoded, and those that were found here.
        overflow: items that found no room beside what is yet to be fetched. They are handed over all the same.
    """

    clock: Clock | None = None
    max_items: int = 1
    ended: Callable[[Encoder, list[Piece], float], None] | None = None
    observer: EncodeObserver | None = None
    cache: TokenCache = field(default_factory=lambda: TokenCache(0.0, lambda key: None))
    busy: float = 0.0
    steps: int = 0
    encoded: int = 0
    hits: int = 0
    overflow: int = 0
    waited: float = 0.0
    queue: deque[Piece] = field(default_factory=deque)
    batch: list[Piece] = field(default_factory=list)
    _start: float = 0.0
    _version: int = 0
    _asleep: bool = True

    def accept(self, piece: Piece, now: float) -> None:
        """A piece arrives. Pieces that arrive at one moment may share a batch."""
        assert self.clock is not None
        self.queue.append(piece)
        if self._asleep:
            self._asleep = False
            self._version += 1
            self.clock.post(now, Kind.WAKE, self.place.number, self._version, self._begin)

    def _begin(self, now: float, version: int) -> None:
        assert self.clock is not None
        queue, batch = self.queue, self.batch
        if not queue:
            self._asleep = True
            return
        self._start, total = now, 0.0
        while queue and len(batch) < self.max_items:
            piece = queue.popleft()
            batch.append(piece)
            total += piece.seconds
            piece.making.start = min(piece.making.start, now)
            self.waited += now - piece.since
        self.busy += total
        self.steps += 1
        self._version += 1
        self.clock.post(now + total, Kind.STEP_END, self.place.number, self._version, self._end)

    def _end(self, now: float, version: int) -> None:
        assert self.ended is not None
        batch, self.batch = self.batch, []
        self.encoded += len(batch)
        if self.observer is not None:
            self.observer.encoded(self, self._start, now, len(batch))
        self.ended(self, batch, now)
        self._begin(now, version)

    @property
    def drained(self) -> bool:
        """Nothing is encoded or waits here, and nobody has yet to fetch anything from here."""
        return self._asleep and self.cache.read
