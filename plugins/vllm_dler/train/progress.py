"""Progress of a run on standard error: a bar on a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_QUIET_S = 10.0


class Progress:
    """Shows steps with reward and length, where ``show``. A context manager."""

    def __init__(self, steps: int, done: int, show: bool) -> None:
        self._steps, self._done, self._show = steps, done, show
        self._bar: Bar | None = None
        self._task: Any = None
        self._said = 0.0

    def __enter__(self) -> Progress:
        if self._show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Bar(*columns, console=Console(file=sys.stderr))
            self._task = self._bar.add_task("", total=self._steps, completed=self._done)
            self._bar.start()
        return self

    def step(self, entry: dict[str, Any]) -> None:
        """A step was taken."""
        text = (
            f"right in time {entry['right_in_time']:.1%}, {entry['length']:.1f} tokens, "
            f"entropy {entry['entropy']:.3f}, groups kept {entry['groups_kept']:.0%}"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=entry["step"], description=text)
        elif entry["step"] == self._steps or time.monotonic() - self._said >= _QUIET_S:
            self._said = time.monotonic()
            self.say(f"step {entry['step']}/{self._steps}: {text}")

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif self._show:
            print(text, file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
