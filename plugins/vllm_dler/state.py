"""What was learned, kept in a file over restarts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from vllm_suite.lengths import FileOutcome, OnlineLengths

EVERY_S = 600.0

_log = logging.getLogger("vllm.suite")


class StateFile:
    """Reads the file at the start; writes it every ten minutes, on a thread of its own, and at the end.

    Args:
        path: None where nothing is kept.
        count: told what came of each reading and writing: ``load`` or ``save``, and the outcome.
    """

    def __init__(self, lengths: OnlineLengths, path: str | None, count: Callable[[str, str], None], now: float) -> None:
        self._lengths = lengths
        self._path = path
        self._count = count
        self._next = now + EVERY_S
        self._writer: threading.Thread | None = None
        self._written: list[FileOutcome] = []  # by the writer, and not counted yet
        if path is not None:
            self._note("load", lengths.load(path), "output lengths are learned anew")

    def begin_step(self, now: float) -> None:
        """Write where it is time. Takes no time itself."""
        if self._path is None or now < self._next or (self._writer is not None and self._writer.is_alive()):
            return
        self._next = now + EVERY_S
        self._count_written()
        self._writer = threading.Thread(target=self._save, name="vllm-suite-lengths", daemon=True)
        self._writer.start()

    def close(self) -> None:
        """Write for the last time."""
        if self._writer is not None:
            self._writer.join(10.0)
        self._save()
        self._count_written()

    def _save(self) -> None:
        if self._path is not None:
            self._written.append(self._lengths.save(self._path))

    def _count_written(self) -> None:
        while self._written:
            self._note("save", self._written.pop(0), "output lengths are not kept")

    def _note(self, what: str, found: FileOutcome, consequence: str) -> None:
        self._count(what, found.outcome)
        if found.outcome == "failed":
            _log.warning("vllm-suite: dler: %s: %s", consequence, found.reason)
