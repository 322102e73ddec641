"""Admission by the expected peak of the KV cache, after Past-Future (ASPLOS 2025).

vLLM admits a request when its prompt fits, and evicts one when what all of them generate no longer does. The gate
admits one only where the cache is expected to hold all running requests until each has ended. It trades room for
evictions: where recomputing is cheap, leaving room empty costs more than it saves.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable


def peak(requests: Iterable[tuple[float, int]]) -> float:
    """Tokens in the KV cache at its fullest moment, for requests of (tokens still to come, tokens now).

    A request that has ``r`` tokens to come ends after ``r`` steps; by then it and all that have more to come have
    grown by ``r`` each, and the others have gone.
    """
    most = held = 0.0
    for count, (rest, tokens) in enumerate(sorted(requests, reverse=True), 1):
        held += tokens
        most = max(most, held + rest * count)
    return most


def places(running: list[tuple[float, int]], waiting: Iterable[tuple[float, int]], capacity: float) -> int:
    """How many of ``waiting``, in this order, may begin; at least one where nothing runs."""
    ordered = sorted(running)
    count = 0
    for candidate in waiting:
        insort(ordered, candidate)
        if peak(ordered) > capacity and (running or count):
            return count
        count += 1
    return count
