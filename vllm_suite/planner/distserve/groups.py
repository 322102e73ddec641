"""Requests that decode together, and how DistServe's simulator takes a batch of them from a queue."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

IntArray = np.ndarray[Any, np.dtype[np.int64]]

_NOBODY: IntArray = np.empty(0, dtype=np.int64)


class Group:
    """Requests in the order of their queue. A round costs the same however many they are, until one of them ends.

    Attributes:
        size: requests.
        context: keys held, summed: prompts and the tokens decoded so far.
    """

    __slots__ = ("_ages", "_context", "_ids", "_left", "_soonest", "context", "size")

    def __init__(self, ids: IntArray, left: IntArray, context: IntArray) -> None:
        self._ids, self._left, self._context = ids, left, context
        self._ages = 0
        self.size = len(ids)
        self.context = int(context.sum())
        self._soonest = int(left.min())

    @property
    def before_the_last(self) -> int:
        """Rounds that can pass before the one that ends a request."""
        return self._soonest - self._ages - 1

    @property
    def keys(self) -> int:
        """Keys attended to in the next round."""
        return self.context + self.size

    def age(self, rounds: int) -> None:
        """Every request decodes so many tokens more."""
        self._ages += rounds
        self.context += rounds * self.size

    def take_ended(self) -> IntArray:
        """Remove the requests whose last token has been decoded and return their numbers."""
        if self._ages < self._soonest:
            return _NOBODY
        self._settle()
        ended = self._left == 0
        found: IntArray = self._ids[ended]
        kept = ~ended
        self._ids, self._left, self._context = self._ids[kept], self._left[kept], self._context[kept]
        self.size, self.context = len(self._ids), int(self._context.sum())
        self._soonest = int(self._left.min()) if self.size else 0
        return found

    def split(self, sequences: int, keys: int) -> tuple[Group | None, Group | None]:
        """As many from the front as fit, and the rest."""
        self._settle()
        fit = int(np.searchsorted(np.cumsum(self._context + 1), keys, side="right"))
        cut = min(sequences, fit)
        parts = [self._of(slice(0, cut)) if cut else None, self._of(slice(cut, None)) if cut < self.size else None]
        return parts[0], parts[1]

    def _of(self, part: slice) -> Group:
        return Group(self._ids[part], self._left[part], self._context[part])

    def _settle(self) -> None:
        if self._ages:
            self._left = self._left - self._ages
            self._context = self._context + self._ages
            self._soonest -= self._ages
            self._ages = 0

    @staticmethod
    def joined(groups: list[Group]) -> Group:
        """One group of several, in their order."""
        if len(groups) == 1:
            return groups[0]
        for group in groups:
            group._settle()
        return Group(
            np.concatenate([group._ids for group in groups]),
            np.concatenate([group._left for group in groups]),
            np.concatenate([group._context for group in groups]),
        )


def take(queue: deque[Group], sequences: int, keys: int) -> Group | None:
    """Remove from the front of a queue what fits, stopping at the first request that does not; None for nothing.

    Args:
        sequences, keys: of the batch at most; keys with the token that each request is about to decode.
    """
    taken: list[Group] = []
    while queue:
        group = queue[0]
        if group.size <= sequences and group.keys <= keys:
            sequences, keys = sequences - group.size, keys - group.keys
            taken.append(queue.popleft())
            continue
        first, rest = group.split(sequences, keys)
        if first is not None:
            taken.append(first)
            assert rest is not None
            queue[0] = rest
        break
    return Group.joined(taken) if taken else None
