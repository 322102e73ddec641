"""Checkpoints of a DLER run: folders that appear whole or not at all, and know which run they belong to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from vllm_dler.train.grading import TrainError

STATE = "dler.json"
_PREFIX = "checkpoint-"


def found(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
    return sorted(named, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def seal(partial: Path, folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Move a written checkpoint into ``folder`` under its own name, and delete all but the newest ``keep``.

    ``state`` goes into it together with the size of each of its files. Everything is on disk before the name is.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / STATE).write_text(json.dumps({**state, "files": sizes}, indent=2) + "\n", encoding="utf-8")
    for path in [*files, partial / STATE, *(path for path in partial.rglob("*") if path.is_dir()), partial]:
        _sync(path)
    target = folder / partial.name
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _sync(folder)
    for old in found(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def read_state(checkpoint: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """What `seal` was given. Raises TrainError for a damaged checkpoint, or one of a run with other settings."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        before = state["fingerprint"]
        sizes = {name: (checkpoint / name).stat().st_size for name in state["files"]}
    except (OSError, ValueError, KeyError) as error:
        raise TrainError(f"{checkpoint} is not whole ({error}): delete it to go on from the one before") from error
    wrong = sorted(name for name, size in state["files"].items() if sizes[name] != size)
    if wrong:
        raise TrainError(
            f"{checkpoint} is not whole: {wrong[0]} has {sizes[wrong[0]]} of {state['files'][wrong[0]]} bytes; "
            "delete the folder to go on from the one before"
        )
    other = sorted(key for key in before.keys() | fingerprint.keys() if before.get(key) != fingerprint.get(key))
    if other:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {fingerprint.get(key)!r}" for key in other)
        raise TrainError(f"{checkpoint} belongs to a run with other settings: {told}")
    return state


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
