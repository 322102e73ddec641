"""Progress of a fleet's start: a live table on a terminal, one plain line per change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from vllm_suite.fleet.process import FleetProcess, tail

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

_STYLE = {"ready": "green", "failed": "bold red", "restarting": "yellow"}
_STYLE |= dict.fromkeys(("starting", "draining", "stopping"), "cyan")


class Console:
    """Shows what happens to the processes given to `watch`; a context manager. Writes to `stream`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._began = time.monotonic()
        self._processes: Sequence[FleetProcess] = ()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console as RichConsole
            from rich.live import Live

            # Redrawn by a thread of rich's; the processes change in the event loop, reading them is harmless.
            console = RichConsole(file=self._stream)
            self._live = Live(get_renderable=self._table, console=console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def watch(self, processes: Sequence[FleetProcess]) -> None:
        """The processes that the table lists."""
        self._processes = processes

    def release(self) -> None:
        """Leave the last table on the screen and go on with plain lines."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def changed(self, process: FleetProcess, why: str) -> None:
        """A process's state changed."""
        if self._live is None:
            self.say(f"{process.name}: {process.state}" + (f" {why}" if why else ""))

    def say(self, text: str) -> None:
        """One line with the seconds since the start."""
        line = f"[{time.monotonic() - self._began:6.1f} s] {text}"
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, expand=True)
        for column in ("instance", "role", "state", "s", "restarts"):
            table.add_column(column, no_wrap=True)
        # Takes what the others leave.
        table.add_column("last line of its log", no_wrap=True, ratio=1)
        now = time.monotonic()
        for process in self._processes:
            until = process.ready_at or now
            seconds = f"{until - process.started_at:.1f}" if process.started_at else ""
            last = "" if process.state == "ready" else tail(process.launch.log, 1)
            table.add_row(
                process.name,
                process.launch.role,
                Text(process.state, style=_STYLE.get(process.state, "")),
                seconds,
                str(process.restarts or ""),
                Text(last, style="dim"),
            )
        return table
