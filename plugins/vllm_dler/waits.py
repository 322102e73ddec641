"""How long requests wait, beside how long they would wait if the first to come were the first served.

The ``k``-th admission of a run serves, first come first served, the ``k``-th arrival. So the times of admission tell
both: what each request waited, and what the same number of requests would have waited in the order of coming. The
difference is what the order costs the tail; nothing is simulated.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import NamedTuple

from vllm_dler.order import Tracked


class Wait(NamedTuple):
    """One admission. ``seconds`` waited, ``in_turn`` waited by whose turn it was, ``size`` of the request admitted."""

    seconds: float
    in_turn: float
    size: float


class Waits:
    """Requests that have never run, and the last ``window`` that began to."""

    def __init__(self, window: int) -> None:
        self.window: deque[Wait] = deque(maxlen=window)
        self.overtakes = 0
        self._waiting: OrderedDict[int, float] = OrderedDict()  # arrivals by number
        self._in_turn: deque[tuple[int, float]] = deque()  # the same, if it went by turns
        self._left: set[int] = set()  # numbers in `_in_turn` that are gone

    def __len__(self) -> int:
        return len(self._waiting)

    def arrived(self, state: Tracked) -> None:
        self._waiting[state.seq] = state.arrival
        self._in_turn.append((state.seq, state.arrival))

    def admitted(self, state: Tracked, now: float) -> None:
        """A request began to run for the first time."""
        if self._waiting.pop(state.seq, None) is None:
            return
        if self._waiting and next(iter(self._waiting)) < state.seq:
            self.overtakes += 1
        self.window.append(Wait(now - state.arrival, now - self._next(state.arrival), state.size))

    def left(self, state: Tracked) -> None:
        """A request ended; where it never ran, it no longer waits."""
        if self._waiting.pop(state.seq, None) is None:
            return
        if self._in_turn and state.seq >= self._in_turn[0][0]:
            self._left.add(state.seq)
            while self._in_turn and self._in_turn[0][0] in self._left:
                self._left.discard(self._in_turn.popleft()[0])
        else:  # its turn has been, and somebody else is still to have his
            self._next(state.arrival)

    def oldest_s(self, now: float) -> float:
        """Age of the oldest request that waits; 0 where none does."""
        return now - next(iter(self._waiting.values())) if self._waiting else 0.0

    def tails(self, now: float, share: float = 0.99) -> tuple[float, float] | None:
        """That quantile of waiting, and of waiting in turn; those who wait now count with their age. None without
        a single admission."""
        if not self.window:
            return None
        real = quantile([wait.seconds for wait in self.window], share)
        turn = quantile([wait.in_turn for wait in self.window], share)
        return max(real, self.oldest_s(now)), max(turn, now - self._in_turn[0][1] if self._in_turn else 0.0)

    def _next(self, otherwise: float) -> float:
        """Arrival of whose turn it is."""
        while self._in_turn:
            seq, arrival = self._in_turn.popleft()
            if seq not in self._left:
                return arrival
            self._left.discard(seq)
        return otherwise


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of ``values`` does not exceed. Raises IndexError for none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
