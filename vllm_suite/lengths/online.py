"""The estimator: one fading histogram per key, Kaplan-Meier tables made of them when asked, and back-off."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from vllm_suite.lengths.model import Key
from vllm_suite.lengths.settings import LengthSettings
from vllm_suite.lengths.sketch import MAX_TOKENS, Sketch
from vllm_suite.lengths.survival import Survival

# A longer key is remembered by its digest: clients choose some of them.
_LONGEST_KEY = 128
# A table is made anew when this share of its observations is missing from it.
_STALE = 1 / 64


class _Known:
    """What is known under one key."""

    __slots__ = ("fresh", "sketch", "table")

    def __init__(self) -> None:
        self.sketch = Sketch()
        self.table: Survival | None = None
        self.fresh = 0  # observations that are not in the table

    def survival(self) -> Survival:
        table = self.table
        if table is None or self.fresh > _STALE * self.sketch.count:
            table = self.table = Survival(self.sketch.entries())
            self.fresh = 0
        return table


class OnlineLengths:
    """A `LengthModel` that learns from what it is told. Memory is bounded by `LengthSettings.max_keys`."""

    def __init__(self, settings: LengthSettings | None = None) -> None:
        self.settings = settings or LengthSettings()
        self._lock = threading.Lock()
        self._all = _Known()
        self._keys: OrderedDict[Key, _Known] = OrderedDict()
        observations = self.settings.half_life_observations
        self._growth = 2.0 ** (1.0 / observations) if observations else 1.0

    def observe(self, keys: Sequence[Key], tokens: int, *, censored: bool = False, now: float | None = None) -> None:
        """See `LengthModel.observe`. A length past 16 M tokens counts as that. Raises ValueError for a negative one."""
        if tokens < 0:
            raise ValueError(f"a sequence of {tokens} tokens cannot be: lengths are 0 or more")
        tokens = min(tokens, MAX_TOKENS)
        when = time.time() if now is None else now
        with self._lock:
            self._add(self._all, tokens, censored, when)
            for key in keys:
                name = _name(key)
                known = self._keys.get(name)
                if known is None:
                    known = self._keys[name] = _Known()
                    if len(self._keys) > self.settings.max_keys:
                        self._keys.popitem(last=False)
                else:
                    self._keys.move_to_end(name)
                self._add(known, tokens, censored, when)

    def remaining(self, keys: Sequence[Key], age: int, cap: int) -> float | None:
        """See `LengthModel.remaining`: from the first key with enough exact observations. 0 from `cap` on."""
        if age < 0:
            raise ValueError(f"an age of {age} tokens cannot be: ages are 0 or more")
        with self._lock:
            tables = self._tables(keys)
        if not tables:
            return None
        return self._mean(tables, 0, age, cap) if age < cap else 0.0

    def quantile(self, keys: Sequence[Key], q: float, age: int, cap: int) -> float | None:
        """See `LengthModel.quantile`."""
        if not 0.0 < q < 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, and {q} does not")
        if age < 0:
            raise ValueError(f"an age of {age} tokens cannot be: ages are 0 or more")
        with self._lock:
            tables = self._tables(keys)
        if not tables:
            return None
        low, high = age, max(cap, age)
        while low < high:
            middle = (low + high) // 2
            if 1.0 - self._survives(tables, 0, age, middle) >= q:
                high = middle
            else:
                low = middle + 1
        return float(low - age)

    def level(self, keys: Sequence[Key]) -> int | None:
        """Index of the key that answers: the first with enough exact observations, ``len(keys)`` for the global one."""
        with self._lock:
            for index, key in enumerate(keys):
                known = self._keys.get(_name(key))
                if known is not None and known.sketch.count >= self.settings.min_observations:
                    return index
            return len(keys) if self._all.sketch.bins else None

    def _add(self, known: _Known, tokens: int, censored: bool, when: float) -> None:
        growth = self._growth
        half_life_s = self.settings.half_life_s
        if half_life_s and known.sketch.bins:
            growth *= 2.0 ** min(max(when - known.sketch.last, 0.0) / half_life_s, 100.0)
        known.sketch.add(tokens, censored, growth, when)
        known.fresh += 1

    def _tables(self, keys: Sequence[Key]) -> list[Survival]:
        """Tables to ask in turn, the global one last; empty where nothing is known."""
        if not self._all.sketch.bins:
            return []
        tables = []
        for key in keys:
            name = _name(key)
            known = self._keys.get(name)
            if known is not None and known.sketch.count >= self.settings.min_observations:
                self._keys.move_to_end(name)
                tables.append(known.survival())
        tables.append(self._all.survival())
        return tables

    def _mean(self, tables: list[Survival], start: int, age: float, cap: float) -> float:
        """Expected rest by ``tables[start:]``; past a table's largest observation the next one goes on."""
        for index in range(start, len(tables)):
            table = tables[index]
            alive = table.beyond(age)
            if alive <= 0.0 or age >= table.last:
                continue
            rest = (table.restricted(min(cap, table.last)) - table.restricted(age)) / alive
            end = table.beyond(table.last)
            if cap > table.last and end > 0.0:
                rest += end / alive * self._mean(tables, index + 1, table.last, cap)
            return rest
        power = self.settings.tail_index - 1.0
        age = max(age, 1.0)
        return min(age / power * (1.0 - (age / cap) ** power), cap - age) if cap > age else 0.0

    def _survives(self, tables: list[Survival], start: int, age: float, tokens: float) -> float:
        """``P(L > tokens | L > age)`` by ``tables[start:]``."""
        for index in range(start, len(tables)):
            table = tables[index]
            alive = table.beyond(age)
            if alive <= 0.0 or age >= table.last:
                continue
            if tokens < table.last:
                return table.beyond(tokens) / alive
            end = table.beyond(table.last)
            return end / alive * self._survives(tables, index + 1, table.last, tokens) if end > 0.0 else 0.0
        age = max(age, 1.0)
        return (age / max(tokens, age)) ** self.settings.tail_index


def _name(key: Key) -> Key:
    return key if len(key) <= _LONGEST_KEY else "~" + blake2b(key.encode(), digest_size=16).hexdigest()
