"""State of the estimator as plain data and as a file."""

from __future__ import annotations

from typing import Literal, NamedTuple


class StateError(ValueError):
    """A state that is torn, of another format or of another version; the message says which."""


class FileOutcome(NamedTuple):
    """What came of reading or writing a state file. Neither raises: an engine goes on without it."""

    outcome: Literal["ok", "missing", "failed"]
    reason: str = ""
