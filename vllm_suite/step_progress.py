"""Steps of a training run on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_QUIET_S = 10.0


class StepProgress:
    """Shows steps, where ``show``. A context manager.

    Args:
        done: steps taken before this run.
        at_once: whether the first step gets a plain line at once, or the quiet time begins here.
    """

    def __init__(self, steps: int, done: int, show: bool, at_once: bool = False) -> None:
        self._steps, self._done, self._show = steps, done, show
        self._bar: Bar | None = None
        self._task: Any = None
        self._said = 0.0 if at_once else time.monotonic()

    def __enter__(self) -> Self:
        if self._show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(file=sys.stderr))
            self._task = self._bar.add_task("", total=self._steps, completed=self._done)
            self._bar.start()
        return self

    def taken(self, step: int, text: str, aside: str = "") -> None:
        """Step number ``step`` was taken; ``aside`` is for plain lines, since a bar shows the pace itself."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif step == self._steps or time.monotonic() - self._said >= _QUIET_S:
            self._said = time.monotonic()
            self.say(f"step {step}/{self._steps}: {text}{aside}")

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._show:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
