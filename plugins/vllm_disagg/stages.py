"""How long each request waited and worked here: an instance's part of the split by stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

from vllm_disagg.stats import SuiteKVStats

TIMES_KEY = "suite_times"
"""Beside the reference, for the router: seconds by stage. Nobody decides anything by it."""

Stage = Literal["queue", "prefill", "transfer"]


class Stages:
    """Two time stamps per request that prefills or pulls; the scheduler calls it, tokens do not.

    Args:
        stats: returns the container that is counted into now.
    """

    def __init__(self, stats: Callable[[], SuiteKVStats], clock: Callable[[], float] = time.monotonic) -> None:
        self._stats = stats
        self._clock = clock
        self._arrived: dict[str, float] = {}
        self._begun: dict[str, tuple[float, float]] = {}

    def arrived(self, request_id: str) -> None:
        """The scheduler has got the request."""
        self._arrived[request_id] = self._clock()

    def begun(self, request_id: str) -> None:
        """Its prefill was scheduled or its pull ordered; what comes after a preemption does not count again."""
        arrived = self._arrived.pop(request_id, None)
        if arrived is not None:
            now = self._clock()
            self._begun[request_id] = (now, now - arrived)
            self._stats().staged("queue", now - arrived)

    def done(self, request_id: str, stage: Stage) -> dict[str, float] | None:
        """The work is done; returns the seconds for `TIMES_KEY`, None where it was not begun."""
        found = self._begun.pop(request_id, None)
        if found is None:
            return None
        begun, queued = found
        seconds = self._clock() - begun
        self._stats().staged(stage, seconds)
        return {"queue_s": round(queued, 6), f"{stage}_s": round(seconds, 6)}

    def forget(self, request_id: str) -> None:
        """The request has ended, however it did."""
        self._arrived.pop(request_id, None)
        self._begun.pop(request_id, None)
