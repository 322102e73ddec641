"""The order of requests: a key that is fixed on arrival and can only fall.

``key = arrival + offset(S)`` seconds, where ``S`` is the size of a request in generated tokens: its expected output,
and its prompt that is not cached at ``prefill_weight`` each. The offset is a rule's (`vllm_dler.rules`): ``kappa * S``,
or minus a boost.

Nobody is overtaken from outside a window. Under rule ``kappa`` a request of size ``S`` is never overtaken by one that
arrived more than ``kappa * S`` seconds after it: the other's key is at least its arrival, and its own is at most
``arrival + kappa * S`` and never rises. Under rule ``boost`` the window is ``max_boost_s`` for everybody: the other's
key is at least its arrival minus that, and its own is at most its arrival.

Where nothing is known of any length, offsets are 0 and the order is that of arrival.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_dler.groups import Group

Rank = tuple[int, float, float, int]
"""User's priority, key, place within a group, number of arrival; the smallest goes first."""


@dataclass(slots=True, eq=False)
class Tracked:
    """What is known of one request from its arrival to its end.

    Attributes:
        arrival: seconds, on the scheduler's clock; never below that of a request that came before.
        keys: classes for the length model, most specific first.
        label: class in metrics.
        cap: most tokens that it can generate.
        uncached: prompt tokens to compute.
        lost: prompt tokens to compute again after an eviction.
        predicted: expected output when it arrived; None where nothing was known.
        size: S of the estimate that gave ``key``.
        key: smallest so far.
        deadline: what the queue sorts by: ``key``, or that of its group.
        spread: place within a group; smaller goes first.
        base: output tokens when it last began to run.
        admitted: when it first began to run.
        cut: whether a cap of its class shortened it.
        room: tokens kept free for it while it runs.
        alike, turn: what requests with the same expectations have in common, and when that was looked up.
        score, scored: tokens to come for each to compute again, and the age at which that was estimated.
    """

    request: Any
    seq: int
    arrival: float
    priority: int = 0
    keys: tuple[str, ...] = ()
    label: str = ""
    cap: int = 1
    uncached: int = 0
    lost: int = 0
    predicted: float | None = None
    size: float = 0.0
    key: float = math.inf
    deadline: float = math.inf
    spread: float = 0.0
    base: int = 0
    evictions: int = 0
    admitted: float | None = None
    cut: bool = False
    room: int = 0
    alike: tuple[tuple[str, ...], int] = ((), 0)
    turn: int = -1
    score: float = 0.0
    scored: int = -(1 << 30)
    group: Group | None = field(default=None, repr=False)

    @property
    def rank(self) -> Rank:
        return (self.priority, self.deadline, self.spread, self.seq)

    def lower(self, offset: float, size: float) -> bool:
        """Take a new estimate; whether the key fell."""
        key = self.arrival + offset
        if key >= self.key:
            return False
        self.key, self.size = key, size
        if key < self.deadline:
            self.deadline = key
        return True


class Arrivals:
    """Times of arrival that never fall, so that their order is the order of coming."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._count = 0

    def next(self, stamped: float, now: float) -> tuple[int, float]:
        """Number and time of the next request: when the front end ``stamped`` it, where that can be."""
        self._last = max(self._last, min(stamped, now))
        self._count += 1
        return self._count, self._last


def size_of(uncached: int, remaining: float | None, prefill_weight: float) -> float:
    """S in generated tokens; 0 where nothing is known of the output."""
    return 0.0 if remaining is None else prefill_weight * uncached + remaining
