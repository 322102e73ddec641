"""Progress of work on a checkpoint: a bar on a terminal, one plain line per weight file elsewhere."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

# Without a terminal, where no file that gets finished says so.
_SAY_EVERY_S = 10.0


def human(count: float) -> str:
    """Bytes in the unit that suits them."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.2f} {name}"


class Progress:
    """Shows what was done of a whole. A context manager; writes to `stream` (default: standard error)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._task: Any = None
        self._what = ""
        self._total = self._done = self._before = 0
        self._began = self._said = time.monotonic()

    def start(self, total: int, done: int, what: str = "") -> None:
        """`total` bytes are to be there in the end, `done` of them are. With `what` it is no file that is written but
        other work, and `total` in any unit."""
        self._total, self._done, self._before, self._what = total, done, done, what
        self._began = self._said = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                TaskProgressColumn,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )
            from rich.progress import Progress as Bar

            amount = [TaskProgressColumn()] if what else [DownloadColumn(binary_units=True), TransferSpeedColumn()]
            columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task(what, total=total, completed=done)
            self._bar.start()

    def advance(self, count: int) -> None:
        """`count` more is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif self._what and time.monotonic() - self._said > _SAY_EVERY_S:
            self._said = time.monotonic()
            self.say(f"{self._what}: {self._done / max(self._total, 1):.0%}")

    def wrote(self, name: str) -> None:
        """A weight file is finished."""
        if self._bar is None:
            rate = (self._done - self._before) / max(time.monotonic() - self._began, 1e-9)
            self.say(f"{name} written; {human(self._done)} of {human(self._total)}, {human(rate)}/s")

    def say(self, text: str) -> None:
        """One line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)

    def stop(self) -> None:
        """Leave the bar as it is and go on with plain lines."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def peak_rss() -> int:
    """Bytes, of this program. What getrusage tells includes the memory of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0
