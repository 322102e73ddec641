"""Who gives way when the KV cache is full.

vLLM evicts the last of its running requests, which starts again later from its tokens. Here the list is sorted so
that the last is the one with the latest deadline; a request that has just begun to run, or has given way too often,
is moved to the front. Each eviction of a request multiplies what it may generate before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dler.config import VictimSettings
from vllm_dler.order import Tracked

# One step rarely evicts more; the search for further victims ends there.
_ENOUGH = 8


class Victims:
    """Sorts vLLM's list of running requests."""

    def __init__(self, settings: VictimSettings, tracked: Callable[[Any], Tracked]) -> None:
        self._settings = settings
        self._tracked = tracked

    def sort(self, running: list[Any]) -> None:
        """Most deserving first, in place. A stable order moves nothing, so steps that follow cost a comparison each."""
        tracked = self._tracked
        running.sort(key=lambda request: tracked(request).rank)
        kept: list[Any] = []
        eligible: list[Any] = []
        index = len(running)
        while index and len(eligible) < _ENOUGH:
            index -= 1
            request = running[index]
            (kept if self.protected(tracked(request)) else eligible).append(request)
        if kept and eligible:
            running[:] = kept[::-1] + running[:index] + eligible[::-1]

    def protected(self, state: Tracked) -> bool:
        """Whether a running request is not to be evicted while there are others."""
        settings = self._settings
        if state.evictions >= settings.max_evictions:
            return True
        least = settings.min_run * settings.growth**state.evictions
        ran = state.request.num_output_tokens - state.base
        return bool(ran < min(least, state.cap - state.base))
