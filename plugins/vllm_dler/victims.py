"""Who gives way when the KV cache is full.

vLLM evicts the last of its running requests, which starts again later from its tokens. Here the list is sorted so
that the last is the one with most tokens still to come for each that is to be computed again: it would hold its blocks
longest, and loses least. The user's priority goes first, and a request that has given way too often, or has just begun
to run, goes last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dler.config import VictimSettings
from vllm_dler.order import Tracked

# Generated tokens after which a running request is estimated anew.
_STEP = 16


class Victims:
    """Sorts vLLM's list of running requests. ``expected`` gives the tokens that one has still to generate."""

    def __init__(
        self,
        settings: VictimSettings,
        tracked: Callable[[Any], Tracked],
        expected: Callable[[Tracked], float | None],
    ) -> None:
        self._settings = settings
        self._tracked = tracked
        self._expected = expected

    def sort(self, running: list[Any]) -> None:
        """Most deserving first, in place."""
        running.sort(key=self._place)

    def _place(self, request: Any) -> tuple[int, bool, float]:
        state = self._tracked(request)
        age = request.num_output_tokens
        if not 0 <= age - state.scored < _STEP:
            self._score(state, age)
        return (state.priority, not self.protected(state, age), state.score)

    def protected(self, state: Tracked, age: int) -> bool:
        """Whether a running request is not to be evicted while there are others."""
        settings = self._settings
        if state.evictions >= settings.max_evictions:
            return True
        return bool(settings.min_run and age - state.base < settings.min_run * settings.growth**state.evictions)

    def _score(self, state: Tracked, age: int) -> None:
        rest = self._expected(state)
        state.scored = age
        # Where nothing is known, who loses least.
        state.score = (1.0 if rest is None else rest) / (state.lost + age + 1)
