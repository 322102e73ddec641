"""How often an engine with nothing to execute makes steps for its transfers and leases."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from vllm_disagg.leases import LeaseBook

# Longest sleep of an engine that keeps blocks and has nothing to do. A worker spins for a second after each step, so
# short sleeps would save nothing; a consumer that pulled without a claim is noticed this late.
MAX_IDLE_S = 10.0


class Pace:
    """The first steps come at vLLM's own pace of one a millisecond. Then, while a pull from or to this instance is
    under way, one in five: a first connection needs the workers of both ends to step. With nothing but leases, when
    the next one ends or a consumer writes."""

    def __init__(self, book: LeaseBook) -> None:
        self._book = book
        self._events = threading.Event()
        self._steps = 0
        self.wake: Callable[[], None] = lambda: None

    def event(self) -> None:
        """Something happened that the engine should look at. From any thread."""
        self._events.set()
        self.wake()

    def worked(self) -> None:
        """A step had something to execute."""
        self._steps = 0

    def wait_s(self, transferring: bool) -> float:
        """Seconds until the next step; called when a step had nothing to execute."""
        if self._events.is_set():
            self._events.clear()
            self._steps = 0
        self._steps += 1
        if transferring or self._book.being_read():
            return 0.0 if self._steps < 30 else 0.004
        expiry = self._book.next_expiry()
        if self._steps < 10:
            return 0.0
        if expiry is None:
            return math.inf  # the engine waits for another connector, or is about to have nothing to do
        return min(max(expiry - time.monotonic(), 0.001), MAX_IDLE_S)
