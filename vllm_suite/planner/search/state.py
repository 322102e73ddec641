"""What was found so far, on disk: a search that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class StateError(ValueError):
    """A state file of another search, or none at all."""


def digest(value: object) -> str:
    """A short name of a value by its `repr`, which has to be the same for equal values."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:20]


class State:
    """Results of finished tasks by their keys; one JSON object a line, the first of them names the inputs.

    A line that was cut off by a crash is dropped. A context manager.

    Args:
        path: None keeps everything in memory.
        inputs: digest of all that the results depend on.

    Raises:
        StateError: the file is of other inputs, or is not a state file.
    """

    def __init__(self, path: Path | None, inputs: str) -> None:
        self.path, self.inputs = path, inputs
        self.known: dict[str, Any] = {}
        self._file: Any = None
        if path is None:
            return
        kept = self._read(path) if path.exists() else []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._line({"inputs": inputs})
        for line in kept:
            self._line(line)
            self.known[line["task"]] = line["result"]

    def _read(self, path: Path) -> list[dict[str, Any]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            found = json.loads(lines[0])["inputs"] if lines else self.inputs
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{path}: not a state file of a search; name another file") from error
        if found != self.inputs:
            raise StateError(f"{path}: of a search with other inputs (model, hardware, workload, targets or space);"
                             " delete it or name another file")  # fmt: skip
        kept = []
        for line in lines[1:]:
            try:
                kept.append(json.loads(line))
            except ValueError:
                break
        return kept

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, task: str, result: Any) -> None:
        """Keep a result; it is on disk when this returns."""
        self.known[task] = result
        if self._file is not None:
            self._line({"task": task, "result": result})

    def _line(self, value: object) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")) + "\n")
        self._file.flush()
