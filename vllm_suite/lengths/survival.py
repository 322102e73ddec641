"""Kaplan-Meier survival of output lengths, precomputed for queries by bisection."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import log

# A length is the mean of a bin, and may come out above the whole number that all of the bin are.
_ROUNDED_UP = 1.0 + 1e-9


class Survival:
    """``S(t) = P(L > t)`` of one key, a step function known up to its largest observation.

    Kaplan & Meier (1958): at each length t with exact weight d and weight n of what reached t, S falls by the
    factor ``1 - d/n``. What is censored at t counts among those that reached it.
    """

    __slots__ = ("_logs", "after", "area", "at", "last", "weight")

    def __init__(self, at: Sequence[float], exact: Sequence[float], censored: Sequence[float]) -> None:
        """Lengths in ascending order with the weights of what ended and of what was cut off there; at least one."""
        weights = [one + other for one, other in zip(exact, censored, strict=True)]
        beyond = list(accumulate(reversed(weights), initial=0.0))
        beyond.reverse()  # beyond[i]: of the observations from the i-th length on
        after, area = [1.0], [0.0]
        survival, total, previous = 1.0, 0.0, 0.0
        for tokens, ended, reached in zip(at, exact, beyond, strict=False):
            total += survival * (tokens - previous)
            previous = tokens
            if ended:
                survival *= 1.0 - ended / reached
            after.append(survival)
            area.append(total)
        self.at = array("d", (0.0, *at))
        self.after = array("d", after)
        self.area = array("d", area)
        self.weight = array("d", beyond)  # weight[i]: of observations longer than at[i]
        self.last = previous
        self._logs: tuple[float, float] | None = None

    def index(self, tokens: float) -> int:
        """Place of the last observed length that is at most `tokens`."""
        return bisect_right(self.at, tokens * _ROUNDED_UP) - 1

    def past(self, tokens: float) -> float:
        """Weight of the observations longer than `tokens`."""
        return self.weight[self.index(tokens)]

    def beyond(self, tokens: float) -> float:
        """``S(tokens)``, held constant past the largest observation."""
        return self.after[self.index(tokens)]

    def restricted(self, tokens: float) -> float:
        """``E[min(L, tokens)]``, the area under S up to there; S held constant past the largest observation."""
        index = self.index(tokens)
        return self.area[index] + self.after[index] * (tokens - self.at[index])

    def log_moments(self, excess: float) -> tuple[float, float]:
        """First and second moment of the log length.

        What survives the largest observation exceeds it by an exponential variable of mean `excess` on the log scale.
        Computed once: `excess` is the same at each call.
        """
        if self._logs is None:
            first = second = 0.0
            previous = 1.0
            for tokens, left in zip(self.at, self.after, strict=True):
                if left < previous:
                    value = log(max(tokens, 1.0))
                    first += (previous - left) * value
                    second += (previous - left) * value * value
                    previous = left
            if previous > 0.0:
                value = log(max(self.last, 1.0))
                first += previous * (value + excess)
                second += previous * (value * value + 2.0 * value * excess + 2.0 * excess * excess)
            self._logs = (first, second)
        return self._logs
