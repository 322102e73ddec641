"""The distribution that a request's keys together predict.

Each key speaks for itself as far as it has seen sequences that long, and leaves the rest to the next, more general
one: with observations of weight r longer than the request's age, its share is ``r / (r + doubt)``. Past a key's
largest observation, where that was censored, the next one goes on. After the global one comes a heavy tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from vllm_suite.lengths.survival import Survival

# A key with so many times the doubt is not mixed with what comes after it.
_SURE = 64.0


class Prediction:
    """Tables of a request's keys, from the most specific to the global one, each with how much its weight has faded."""

    __slots__ = ("_doubt", "_index", "_scale", "_tables")

    def __init__(self, tables: Sequence[tuple[Survival, float]], doubt: float, tail_index: float) -> None:
        self._tables = tables
        self._doubt = doubt
        self._index = tail_index
        # The tail's mean from age 0 is that of everything seen.
        self._scale = max(tables[-1][0].area[-1], 1.0) * (tail_index - 1.0)

    def mean(self, age: float, cap: float, start: int = 0) -> float:
        """``E[min(L, cap) - age | L > age]`` for an age below the cap."""
        if start == len(self._tables):
            scale, power = self._scale, self._index - 1.0
            return float((scale + age) / power * (1.0 - ((scale + age) / (scale + cap)) ** power))
        table, faded = self._tables[start]
        index = table.index(age)
        alive, weight = table.after[index], table.weight[index] * faded
        if alive <= 0.0 or weight <= 0.0:
            return self.mean(age, cap, start + 1)
        begun = table.area[index] + alive * (age - table.at[index])
        if cap <= table.last:
            rest = (table.restricted(cap) - begun) / alive
        else:
            rest = (table.area[-1] - begun) / alive
            if table.after[-1] > 0.0:
                rest += table.after[-1] / alive * self.mean(table.last, cap, start + 1)
        doubt = self._doubt
        if weight >= _SURE * doubt:
            return rest
        return (weight * rest + doubt * self.mean(age, cap, start + 1)) / (weight + doubt)

    def survives(self, age: float, tokens: float, start: int = 0) -> float:
        """``P(L > tokens | L > age)`` for tokens from the age on."""
        if start == len(self._tables):
            return float(((self._scale + age) / (self._scale + tokens)) ** self._index)
        table, faded = self._tables[start]
        index = table.index(age)
        alive, weight = table.after[index], table.weight[index] * faded
        if alive <= 0.0 or weight <= 0.0:
            return self.survives(age, tokens, start + 1)
        share = table.beyond(tokens) / alive
        if share > 0.0 and tokens > table.last:
            share *= self.survives(table.last, tokens, start + 1)
        doubt = self._doubt
        if weight >= _SURE * doubt:
            return share
        return (weight * share + doubt * self.survives(age, tokens, start + 1)) / (weight + doubt)

    def quantile(self, q: float, age: int, cap: int) -> int:
        """The smallest n with ``P(min(L, cap) - age <= n | L > age) >= q``."""
        low, high = age, max(cap, age)
        while low < high:
            middle = (low + high) // 2
            if 1.0 - self.survives(age, middle) >= q:
                high = middle
            else:
                low = middle + 1
        return low - age

    def spread(self) -> tuple[float, float]:
        """Mean and standard deviation of the log length."""
        first = second = 0.0
        left = 1.0
        for table, faded in self._tables:
            weight = table.weight[0] * faded
            share = left * weight / (weight + self._doubt) if table is not self._tables[-1][0] else left
            mean, square = table.log_moments(1.0 / self._index)
            first += share * mean
            second += share * square
            left -= share
        return first, sqrt(max(second - first * first, 0.0))
