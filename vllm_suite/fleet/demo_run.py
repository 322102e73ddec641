"""What the demos have in common: one fleet in the folder, SIGTERM, laps, the report's file, the exit status."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TextIO

from vllm_suite.fleet.keeper import adopt_orphans
from vllm_suite.fleet.state_file import write_atomically
from vllm_suite.fleet.up import PlanErrors, StartErrors, only_fleet_in
from vllm_suite.provenance import provenance


class DemoFailed(RuntimeError):
    """The demo cannot go on."""


class Laps:
    """Wall seconds of each part of a demo."""

    def __init__(self) -> None:
        self._began = self._last = time.monotonic()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What happened since the last lap was `name`."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._last, 2)
        self._last = now

    def total(self) -> dict[str, float]:
        """All laps and their sum."""
        return {**self.seconds, "total": round(time.monotonic() - self._began, 2)}


def carry_out(
    body: Callable[[], Awaitable[dict[str, Any]]],
    folder: Path,
    json_file: Path,
    show: Callable[[dict[str, Any], TextIO], None],
    claim: str,
    *,
    argv: list[str],
    seed: int,
) -> int:
    """Run a demo, write and show its report. 0 where the report's `ok` says that the `claim` holds, else 1."""
    adopt_orphans()

    async def until_sigterm() -> dict[str, Any]:
        # SIGTERM ends the demo as Ctrl-C does: by cancelling it, so that every fleet is stopped on the way out.
        this = asyncio.current_task()
        assert this is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
        return await body()

    try:
        with only_fleet_in(folder):
            report = asyncio.run(until_sigterm())
    except (*PlanErrors, *StartErrors, DemoFailed, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("stopped by SIGTERM; nothing is left running", file=sys.stderr)
        return 128 + signal.SIGTERM
    report |= provenance(argv, seed)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(json_file, json.dumps(report, indent=1) + "\n")
    show(report, sys.stdout)
    print(f"{claim if report['ok'] else 'NOT what the demo is to show'}; report: {json_file}")
    return 0 if report["ok"] else 1
