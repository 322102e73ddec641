"""``kappa`` that follows the load.

A large kappa serves short requests well and lets long ones wait. It goes down while the tail of waiting is out of its
bound, and up while short requests wait much longer for each of their tokens than long ones do. Keys that are given
fall with it and do not rise with it, so no promise is taken back.
"""

from __future__ import annotations

from vllm_dler.config import AdaptiveSettings
from vllm_dler.waits import Wait, Waits

# Fewer admissions say too little of a 99th percentile or of two thirds.
_LEAST = 16
# Seconds of waiting that nobody minds; below, the order does not matter.
_NEGLIGIBLE_S = 0.05


class Controller:
    """Decides every ``period_s``."""

    def __init__(self, settings: AdaptiveSettings, now: float) -> None:
        self._settings = settings
        self._next = now + settings.period_s

    def decide(self, kappa: float, waits: Waits, now: float) -> float:
        """The kappa to use from now on."""
        settings = self._settings
        if not settings.enabled or now < self._next:
            return kappa
        self._next = now + settings.period_s
        tails = waits.tails(now)
        if tails is None or len(waits.window) < _LEAST:
            return kappa
        tail, in_turn = tails
        bound = settings.tail_s if settings.tail_s is not None else max(settings.tail_ratio * in_turn, _NEGLIGIBLE_S)
        if tail > bound:
            return max(kappa / settings.step, settings.minimum)
        if short_suffering(list(waits.window)) > settings.short_ratio:
            return min(kappa * settings.step, settings.maximum)
        return kappa


def short_suffering(window: list[Wait]) -> float:
    """How many times longer the shortest third waited for each token of size than the longest third; 0 where nobody
    waited to speak of, or nothing is known of sizes."""
    window = sorted((wait for wait in window if wait.size > 0), key=lambda wait: wait.size)
    third = len(window) // 3
    if not third:
        return 0.0
    short, long = window[:third], window[-third:]
    if sum(wait.seconds for wait in short) / third < _NEGLIGIBLE_S:
        return 0.0
    # Long requests that do not wait at all would make any ratio infinite.
    floor = _NEGLIGIBLE_S * third / sum(wait.size for wait in long)
    return _per_token(short) / max(_per_token(long), floor)


def _per_token(waits: list[Wait]) -> float:
    return sum(wait.seconds for wait in waits) / sum(wait.size for wait in waits)
