"""The search's progress on a terminal; nothing elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

from vllm_suite.planner.search.search import Found


class Bar:
    """A context manager, called after every round of a search."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, decided: int, total: int, best: Found | None) -> None:
        """See `vllm_suite.planner.search.search.Progress`."""
        if not sys.stderr.isatty():
            return
        if self._bar is None:
            # Its thread starts after the first round, when the worker processes are there.
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("plans", total=total)
        text = "plans" if best is None else f"best so far: {best.plan.name}"
        self._bar.update(self._task, completed=decided, description=text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
