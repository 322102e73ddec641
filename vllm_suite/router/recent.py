"""The last things that went otherwise than planned: recoveries and changes of membership, for the live page.

Counters say how often, this says when and where. Bounded, and one row for a thing that repeats: an outage of an hour
is a few rows, and leaves what came before it readable.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

LIMIT = 100
AGAIN_S = 60.0
"""The same thing within so many seconds is the same row."""

Kind = Literal["recovery", "membership"]


@dataclass(slots=True)
class Event:
    """One row. `began` and `last` are Unix seconds, `request` is what `request_hash` gives for the latest request."""

    kind: Kind
    what: str
    why: str
    instance: str
    began: float
    last: float
    times: int = 1
    request: str = ""


class Recent:
    """At most LIMIT rows. Single-threaded, like the counters."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._rows: dict[tuple[Kind, str, str, str], Event] = {}
        self._closed: deque[Event] = deque(maxlen=LIMIT)

    def note(self, kind: Kind, what: str, why: str = "", instance: str = "", request: str = "") -> None:
        """It happened now. `request` is the request's id; only its hash is kept."""
        now, key = self._clock(), (kind, what, why, instance)
        row = self._rows.pop(key, None)
        if row is not None and now - row.last > AGAIN_S:
            self._closed.append(row)
            row = None
        if row is None:
            row = Event(kind, what, why, instance, now, now, 0)
        self._rows[key] = row  # at the end: a dictionary keeps the order
        row.times += 1
        row.last = now
        if request:
            row.request = request_hash(request)
        while len(self._rows) > LIMIT:
            self._rows.pop(next(iter(self._rows)))

    def rows(self) -> list[Event]:
        """The latest first."""
        return sorted((*self._rows.values(), *self._closed), key=lambda row: -row.last)[:LIMIT]


def request_hash(rid: str) -> str:
    """The first 12 hex digits of the SHA-256 of a request id: whoever has the id finds the row, nobody else the id."""
    return sha256(rid.encode("utf-8", "surrogateescape")).hexdigest()[:12]
