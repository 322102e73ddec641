"""Progress of a conversion: a bar on a terminal, one plain line per weight file elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


def human(count: float) -> str:
    """Bytes in the unit that suits them."""
    unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
    return f"{count / unit:.2f} {name}"


class Progress:
    """Shows bytes written. A context manager; writes to `stream` (default: standard error)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Bar | None = None
        self._task: Any = None
        self._total = self._done = self._before = 0
        self._began = time.monotonic()

    def start(self, total: int, done: int) -> None:
        """`total` bytes are to be there in the end, `done` of them are."""
        self._total, self._done, self._before, self._began = total, done, done, time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=self._stream))
            self._task = self._bar.add_task("", total=total, completed=done)
            self._bar.start()

    def advance(self, count: int) -> None:
        """`count` more bytes were written."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

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
