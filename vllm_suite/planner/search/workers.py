"""The same function over many tasks on several cores, results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_RUN: Callable[[Any], Any] | None = None
"""In a worker what it runs. Inherited at the fork, because sources and workloads are closures that cannot be sent."""


class OutOfTime(Exception):
    """Not every task was done before the deadline."""


class Workers(Generic[Task, Result]):
    """A context manager. With one process, or where processes cannot be forked, tasks run in this one.

    Args:
        run: called with each task.
        processes: None for one per usable core.
        deadline: of `time.monotonic`; tasks under way are given up then.
    """

    def __init__(
        self, run: Callable[[Task], Result], processes: int | None = None, deadline: float | None = None
    ) -> None:
        self.run, self.deadline = run, deadline
        self.processes = processes or usable_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        global _RUN
        # With a deadline also for one process: a task in this one could not be given up.
        apart = self.processes > 1 or self.deadline is not None
        if apart and "fork" in multiprocessing.get_all_start_methods():
            _RUN = self.run
            self._pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("fork"), _ignore_interrupts)
            # Forked now, before a progress bar starts its thread.
            self._pool.submit(_nothing).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None and kind is not None:
            self.stop()
        elif self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def stop(self) -> None:
        """Give up what is under way."""
        if self._pool is None:
            return
        processes = list((getattr(self._pool, "_processes", None) or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        self._pool = None

    def map(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """Results in the order of the tasks. Raises OutOfTime, and whatever `run` raises."""
        if self._pool is None:
            for task in tasks:
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise OutOfTime
                yield self.run(task)
            return
        futures: list[Future[Any]] = [self._pool.submit(_call, task) for task in tasks]
        for future in futures:
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            if not wait([future], timeout=left).done:
                raise OutOfTime
            yield future.result()


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole group; the parent decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _nothing() -> None:
    return None


def _call(task: Any) -> Any:
    assert _RUN is not None
    return _RUN(task)


def usable_cores() -> int:
    """Of this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
