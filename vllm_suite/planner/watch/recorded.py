"""Windows in a file: to replay what a fleet saw, and to keep what a watch was based on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_suite.planner.watch.window import Histogram, WatchError, Window


@dataclass(frozen=True)
class Recorded:
    """A file of windows: ``{"windows": [{"start", "seconds", "requests", "prompts", "outputs"}, ...]}``, where a
    histogram is ``{"bounds", "counts", "total"}`` and an infinite bound is the string ``+Inf``.
    """

    path: Path

    def windows(self, start: float = float("-inf"), end: float = float("inf")) -> list[Window]:
        """Those that lie between two times, oldest first.

        Raises:
            WatchError: no such file, or another layout; with the window and the reason.
        """
        try:
            whole = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise WatchError(f"{self.path}: {error}") from error
        rows = whole.get("windows") if isinstance(whole, dict) else None
        if not isinstance(rows, list) or not rows:
            raise WatchError(f"{self.path}: no list `windows`")
        found = []
        for index, row in enumerate(rows):
            try:
                found.append(
                    Window(float(row["start"]), float(row["seconds"]), float(row["requests"]),
                           _histogram(row["prompts"]), _histogram(row["outputs"]))
                )  # fmt: skip
            except (KeyError, TypeError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise WatchError(f"{self.path}: window {index}: {reason}") from error
            if found[-1].seconds <= 0:
                raise WatchError(f"{self.path}: window {index}: {found[-1].seconds:g} seconds")
        found.sort(key=lambda window: window.start)
        return [window for window in found if start <= window.start and window.start + window.seconds <= end]

    def write(self, windows: Sequence[Window]) -> None:
        """Keep windows."""
        rows = [asdict(window) for window in windows]
        for row in rows:
            for name in ("prompts", "outputs"):
                row[name]["bounds"] = ["+Inf" if bound == float("inf") else bound for bound in row[name]["bounds"]]
        self.path.write_text(json.dumps({"windows": rows}, indent=1) + "\n", encoding="utf-8")


def _histogram(row: Any) -> Histogram:
    return Histogram(tuple(map(float, row["bounds"])), tuple(map(float, row["counts"])), float(row["total"]))
