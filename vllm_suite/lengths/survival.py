"""Kaplan-Meier survival of output lengths, precomputed for queries by bisection."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


class Survival:
    """``S(t) = P(L > t)`` of one key, a step function known up to its largest observation.

    Kaplan & Meier (1958): at each length t with exact weight d and weight n of what reached t, S falls by the
    factor ``1 - d/n``. What is censored at t counts among those that reached it.
    """

    __slots__ = ("after", "area", "at", "last", "weight")

    def __init__(self, entries: Sequence[tuple[float, float, float]]) -> None:
        """`entries` as `Sketch.entries` gives them; at least one."""
        at = [0.0]
        after = [1.0]
        area = [0.0]
        beyond = [0.0] * (len(entries) + 1)
        for index in range(len(entries) - 1, -1, -1):
            beyond[index] = beyond[index + 1] + entries[index][1] + entries[index][2]
        survival = 1.0
        total = 0.0
        previous = 0.0
        for index, (tokens, exact, _) in enumerate(entries):
            total += survival * (tokens - previous)
            previous = tokens
            if exact:
                # The last of all leaves nothing, whatever the rounding.
                left = beyond[index] - exact
                survival = survival * (left / beyond[index]) if left > 1e-12 * beyond[index] else 0.0
            at.append(tokens)
            after.append(survival)
            area.append(total)
        self.at = at
        self.after = after
        self.area = area
        self.weight = beyond  # weight[i]: of observations longer than at[i]
        self.last = previous

    def past(self, tokens: float) -> float:
        """Weight of the observations longer than `tokens`."""
        return self.weight[bisect_right(self.at, tokens) - 1]

    def beyond(self, tokens: float) -> float:
        """``S(tokens)``, held constant past the largest observation."""
        return self.after[bisect_right(self.at, tokens) - 1]

    def restricted(self, tokens: float) -> float:
        """``E[min(L, tokens)]``, the area under S up to there; S held constant past the largest observation."""
        index = bisect_right(self.at, tokens) - 1
        return self.area[index] + self.after[index] * (tokens - self.at[index])
