"""`fleet.json`: what `up` writes of its processes, for `status` and for people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_suite.fleet.process import FleetProcess

STATE_FILE = "fleet.json"


def snapshot(processes: Iterable[FleetProcess]) -> list[dict[str, Any]]:
    """What is known of each process, as JSON types."""
    return [
        {
            "name": process.name,
            "role": process.launch.role,
            "url": process.launch.url,
            "state": process.state,
            "restarts": process.restarts,
            "exit_code": process.exit_code,
            "pids": process.pids(),
            "log": str(process.launch.log),
        }
        for process in processes
    ]


def write_state(folder: Path, processes: Iterable[FleetProcess]) -> None:
    """Replace the file in `folder`, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"pid": os.getpid(), "processes": snapshot(processes)}, indent=1)
    write_atomically(folder / STATE_FILE, text + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, for readers at any time."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
