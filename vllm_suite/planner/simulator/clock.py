"""The virtual clock: a heap of events, taken in the order of time, kind and number."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable
from enum import IntEnum
from heapq import heappop, heappush
from typing import Protocol, TypeVar

from vllm_suite.planner.simulator.jobs import SimulationError

# Called with the time and the event's version.
Handler = Callable[[float, int], None]


class Arriving(Protocol):
    """What the clock has to know of a job or a request: a unique number, and seconds."""

    @property
    def number(self) -> int: ...

    @property
    def arrival(self) -> float: ...


_A = TypeVar("_A", bound=Arriving)


class Kind(IntEnum):
    """At one moment arrivals come first, then ends of steps, then engines that were idle look at their queues."""

    ARRIVAL = 0
    STEP_END = 1
    WAKE = 2


class Clock:
    """Runs events. Two runs with the same events are the same, whatever order they were posted in.

    Attributes:
        now: seconds.
        events: how many were handled.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._heap: list[tuple[float, int, int, int, Handler]] = []

    def post(self, time: float, kind: int, number: int, version: int, handler: Handler) -> None:
        """Call `handler(time, version)` at that time.

        Args:
            kind: a `Kind`, or another integer; at one moment the lowest comes first.
            number: who posts it: the engine's, the request's.
            version: unique for a kind and a number, so that events are totally ordered; and by it an owner knows an
                event that it has superseded.
        """
        heappush(self._heap, (time, kind, number, version, handler))

    def feed(self, jobs: Iterable[_A], accept: Callable[[_A, float], None]) -> None:
        """Let jobs arrive. They are drawn one at a time, so a trace of any length takes no memory.

        Raises:
            SimulationError: while it runs, where arrivals are not in order.
        """
        source = iter(jobs)
        following = next(source, None)

        def arrive(now: float, version: int) -> None:
            nonlocal following
            job = following
            assert job is not None
            following = next(source, None)
            if following is not None:
                if following.arrival < now:
                    raise SimulationError(
                        f"request {following.number} arrives at {following.arrival:g} s, before request {job.number}"
                        f" at {now:g} s: sort them by arrival"
                    )
                self.post(following.arrival, Kind.ARRIVAL, following.number, version + 1, arrive)
            accept(job, now)

        if following is not None:
            self.post(following.arrival, Kind.ARRIVAL, following.number, 0, arrive)

    @property
    def following(self) -> float:
        """When the next event is; infinity where there is none."""
        return self._heap[0][0] if self._heap else math.inf

    def run(self) -> None:
        """Handle events until there are none.

        Python's collector of reference cycles rests meanwhile, in the whole process: requests leave no cycles, and its
        passes over all that lives took a tenth of the time.
        """
        collected = gc.isenabled()
        gc.disable()
        try:
            self._run()
        finally:
            if collected:
                gc.enable()

    def _run(self) -> None:
        heap, events = self._heap, 0
        try:
            while heap:
                time, _, _, version, handler = heappop(heap)
                self.now = time
                events += 1
                handler(time, version)
        finally:
            self.events += events
