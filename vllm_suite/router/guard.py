"""Deadlines of running requests, all watched by one timer.

A timer per stage and per chunk costs more than the work it watches. Here a stage writes its deadline into a
slot, and one tick every 50 ms cancels the tasks that are past theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from vllm_suite.router.errors import StageTimeout

TICK_S = 0.05


class Guard:
    """The deadline slot of one request; made by `Watchdog.guard`."""

    __slots__ = ("_clock", "_end", "_seconds", "_task", "alive", "deadline", "expired", "stage")

    def __init__(self, clock: Watchdog, task: asyncio.Task[object], total_s: float) -> None:
        self._clock = clock
        self._task = task
        self._end = self.deadline = clock.now + total_s
        self._seconds = total_s
        self.stage = "total"
        self.expired: str | None = None
        # Set by a stage that repeats, a stream above all: at the next tick its time starts anew.
        self.alive = False

    def enter(self, stage: str, seconds: float) -> None:
        """Start a stage that may take `seconds`, or less when the whole request's time ends before."""
        self._seconds = seconds
        self.alive = False
        deadline = self._clock.now + seconds
        if deadline < self._end:
            self.deadline = deadline
            self.stage = stage
        else:
            self.deadline = self._end
            self.stage = "total"

    def renew(self) -> None:
        """Start the current stage's time anew; called by the watchdog for a guard that was marked alive."""
        self.enter(self.stage, self._seconds)

    def fire(self) -> None:
        """Cancel the task; called by the watchdog once per stage."""
        self.expired = self.stage
        self.deadline = float("inf")
        self._task.cancel()

    def cancel(self) -> None:
        """Cancel the task for good."""
        self._task.cancel()

    @contextmanager
    def within(self, stage: str, seconds: float) -> Iterator[None]:
        """A stage whose timeout is raised as `StageTimeout`."""
        self.enter(stage, seconds)
        try:
            yield
        except asyncio.CancelledError as exc:
            timeout = self.timeout()
            if timeout is None:
                raise
            raise timeout from exc

    def timeout(self) -> StageTimeout | None:
        """For the handler of a `CancelledError`: the timeout that caused it, or None for a real cancellation.

        Consumes the cancellation, so the request can go on with another instance.
        """
        if self.expired is None:
            return None
        stage, self.expired = self.expired, None
        if self._task.uncancel() > 0:
            return None
        return StageTimeout(stage)


class Watchdog:
    """Ticks while it is started and fires guards that are past their deadline."""

    def __init__(self, tick_s: float = TICK_S) -> None:
        self._tick_s = tick_s
        self._guards: set[Guard] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # Time of the last tick: reading it costs less than the clock, and a deadline is off by one tick at most.
        self.now = 0.0

    def start(self) -> None:
        """Begin ticking on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._tick()

    def stop(self) -> None:
        """Stop ticking; guards are left alone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def guard(self, total_s: float) -> Guard:
        """A guard of the current task; give it back with `release`."""
        task = asyncio.current_task()
        assert task is not None, "a guard belongs to a task"
        guard = Guard(self, task, total_s)
        self._guards.add(guard)
        return guard

    def release(self, guard: Guard) -> None:
        """Forget a guard whose request has ended."""
        self._guards.discard(guard)

    def cancel_all(self) -> None:
        """Cancel every guarded request: the drain is over."""
        for guard in self._guards:
            guard.cancel()

    def _tick(self) -> None:
        assert self._loop is not None
        # A deadline was set from a tick's time, which lay up to one tick before the true start of its stage.
        late = self._loop.time() - self._tick_s
        self.now = late + self._tick_s
        due = []
        for guard in self._guards:
            if guard.alive:
                guard.renew()
            if guard.deadline <= late:
                due.append(guard)
        for guard in due:
            guard.fire()
        self._timer = self._loop.call_later(self._tick_s, self._tick)
