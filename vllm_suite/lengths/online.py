"""The estimator: a fading histogram per key, Kaplan-Meier tables made of them when asked, and back-off."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from vllm_suite.lengths import storage
from vllm_suite.lengths.model import Key
from vllm_suite.lengths.predict import Prediction
from vllm_suite.lengths.settings import LengthSettings
from vllm_suite.lengths.siblings import Posterior, Siblings
from vllm_suite.lengths.sketch import MAX_TOKENS, Sketch
from vllm_suite.lengths.storage import FileOutcome, SketchState, State, StateError
from vllm_suite.lengths.survival import Survival

# A longer key is remembered by its digest: clients choose some of them.
_LONGEST_KEY = 128
# A table is made anew when more than this share of its weight has come since.
_STALE = 1 / 16


class _Known:
    """What is known under one key."""

    __slots__ = ("fresh", "sketch", "table")

    def __init__(self, sketch: Sketch | None = None) -> None:
        self.sketch = sketch or Sketch()
        self.table: Survival | None = None
        self.fresh = 0  # observations that are not in the table

    def survival(self) -> Survival:
        table = self.table
        if table is None or self.fresh > _STALE * table.weight[0]:
            table = self.table = Survival(*self.sketch.entries())
            self.fresh = 0
        return table


class OnlineLengths:
    """A `LengthModel` that learns from what it is told. Memory is bounded by the settings.

    Attributes:
        turns: grows whenever the answer of `heard` may change for some keys.
    """

    def __init__(self, settings: LengthSettings | None = None) -> None:
        self.settings = settings or LengthSettings()
        self._lock = threading.Lock()
        self.turns = 0
        self._all = _Known()
        self._keys: OrderedDict[Key, _Known] = OrderedDict()
        self._siblings = Siblings(self.settings.max_groups, self.settings.sibling_correlation)
        observations = self.settings.half_life_observations
        self._growth = 2.0 ** (1.0 / observations) if observations else 1.0

    def __len__(self) -> int:
        """Keys remembered, the global one left out."""
        return len(self._keys)

    def observe(
        self,
        keys: Sequence[Key],
        tokens: int,
        *,
        censored: bool = False,
        now: float | None = None,
        group: str | None = None,
    ) -> None:
        """See `LengthModel.observe`. More than 4 M tokens count as 4 M.

        Args:
            group: the same for all samples of one prompt, where there are several; see `remaining` and `forget`.

        Raises:
            ValueError: tokens are negative, or the time is no number.
        """
        if tokens < 0:
            raise ValueError(f"a sequence of {tokens} tokens cannot be: lengths are 0 or more")
        when = time.time() if now is None else now
        if not isfinite(when):
            raise ValueError(f"{when} is no time in seconds")
        tokens = min(tokens, MAX_TOKENS)
        with self._lock:
            if group is not None:
                prediction = self._prediction(keys)
                spread = prediction.spread() if prediction else None
                self._siblings.add(group, tokens, censored, spread)
            self._add(self._all, tokens, censored, when)
            for key in keys:
                name = _name(key)
                known = self._keys.get(name)
                if known is None:
                    known = self._keys[name] = _Known()
                    if len(self._keys) > self.settings.max_keys:
                        dropped = self._keys.popitem(last=False)[1]
                        self.turns += dropped.sketch.count >= self.settings.min_observations
                else:
                    self._keys.move_to_end(name)
                self._add(known, tokens, censored, when)
                self.turns += known.sketch.count == self.settings.min_observations

    def remaining(
        self, keys: Sequence[Key], age: int, cap: int, *, group: str | None = None, running: Sequence[int] = ()
    ) -> float | None:
        """See `LengthModel.remaining`. 0 from `cap` on.

        Args:
            group: samples of it that have ended refine the answer.
            running: tokens made by its other samples that still run; without them the answer is too short, since
                the first to end are the short ones.

        Raises:
            ValueError: a negative age.
        """
        if age < 0:
            raise ValueError(f"an age of {age} tokens cannot be: ages are 0 or more")
        with self._lock:
            prediction = self._prediction(keys)
            posterior = self._posterior(prediction, group, running)
        if prediction is None:
            return None
        if age >= cap:
            return 0.0
        rest = posterior.remaining(age, cap) if posterior else None
        return prediction.mean(age, cap) if rest is None else rest

    def quantile(
        self,
        keys: Sequence[Key],
        q: float,
        age: int,
        cap: int,
        *,
        group: str | None = None,
        running: Sequence[int] = (),
    ) -> float | None:
        """See `LengthModel.quantile` and `remaining`. Raises ValueError for a q that is not between 0 and 1 as well."""
        if not 0.0 < q < 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, and {q} does not")
        if age < 0:
            raise ValueError(f"an age of {age} tokens cannot be: ages are 0 or more")
        with self._lock:
            prediction = self._prediction(keys)
            posterior = self._posterior(prediction, group, running)
        if prediction is None:
            return None
        found = posterior.quantile(q, age, cap) if posterior else None
        return float(prediction.quantile(q, age, cap) if found is None else found)

    def level(self, keys: Sequence[Key]) -> int | None:
        """Index of the key that has most of the say: the first with enough observations, ``len(keys)`` for all."""
        with self._lock:
            for index, key in enumerate(keys):
                known = self._keys.get(_name(key))
                if known is not None and known.sketch.count >= self.settings.min_observations:
                    return index
            return len(keys) if self._all.sketch.bins else None

    def heard(self, keys: Sequence[Key]) -> tuple[Key, ...]:
        """The keys with enough observations to have a say. Requests with the same ones and the same cap have the same
        expectations when they begin."""
        get, least = self._keys.get, self.settings.min_observations
        heard = []
        with self._lock:
            for key in keys:
                known = get(key if len(key) <= _LONGEST_KEY else _name(key))
                if known is not None and known.sketch.count >= least:
                    heard.append(key)
        return tuple(heard)

    def forget(self, group: str) -> None:
        """All samples of the group have ended. Groups that are never forgotten leave by `max_groups`."""
        with self._lock:
            self._siblings.forget(group)

    # State

    def to_dict(self) -> dict[str, Any]:
        """All that was learned, as plain data. Groups under way are left out."""
        result = msgspec.to_builtins(self._state())
        assert isinstance(result, dict)
        return result

    @classmethod
    def from_dict(cls, data: Any, settings: LengthSettings | None = None) -> OnlineLengths:
        """The reverse of `to_dict`; of too many keys the ones unused for longest are left out. Raises `StateError`."""
        made = cls(settings)
        made._restore(storage.parse(data))
        return made

    def save(self, path: Path | str) -> FileOutcome:
        """Replace the file at `path` in one step. Never raises: the reason for a failure is in what it returns."""
        try:
            storage.write(Path(path), self._state())
        except OSError as exc:
            return FileOutcome("failed", f"{path}: {exc.strerror or exc}")
        return FileOutcome("ok")

    def load(self, path: Path | str) -> FileOutcome:
        """Take over what the file holds in place of what is known. Leaves everything as it was where that fails."""
        try:
            self._restore(storage.read(Path(path)))
        except FileNotFoundError:
            return FileOutcome("missing", f"{path}: there is no such file")
        except OSError as exc:
            return FileOutcome("failed", f"{path}: {exc.strerror or exc}")
        except StateError as exc:
            return FileOutcome("failed", f"{path}: {exc}")
        return FileOutcome("ok")

    def merge(self, other: OnlineLengths) -> None:
        """Add what another instance has learned.

        The order of merging does not matter up to rounding, and which keys stay where there are more than `max_keys`:
        those that were observed last. What two states have in common, by a file they both began with, counts twice.
        """
        theirs = other._state()
        sketches = {name: state.sketch(name) for name, state in theirs.keys.items()}
        half_life_s = self.settings.half_life_s
        with self._lock:
            self._all.sketch.absorb(theirs.all.sketch("all"), half_life_s)
            self._all.table = None
            for name, sketch in sketches.items():
                known = self._keys.get(name)
                if known is None:
                    self._keys[name] = _Known(sketch)
                else:
                    known.sketch.absorb(sketch, half_life_s)
                    known.table = None
            self.turns += 1
            newest = sorted(self._keys.items(), key=lambda item: (item[1].sketch.last, item[0]))
            self._keys = OrderedDict(newest[-self.settings.max_keys :])

    def _state(self) -> State:
        with self._lock:
            # Tables as a restored instance will make them.
            for known in (self._all, *self._keys.values()):
                if known.fresh:
                    known.table = None
            everything = self._all.sketch.copy()
            keys = {name: known.sketch.copy() for name, known in self._keys.items()}
        # What takes long waits for nobody, and nobody for it.
        states = {name: SketchState.of(sketch) for name, sketch in keys.items()}
        return State(storage.FORMAT, storage.VERSION, SketchState.of(everything), states)

    def _restore(self, state: State) -> None:
        newest = list(state.keys.items())[-self.settings.max_keys :]
        keys = OrderedDict((_name(name), _Known(found.sketch(f"key {name!r}"))) for name, found in newest)
        everything = _Known(state.all.sketch("all"))
        with self._lock:
            self._all, self._keys = everything, keys
            self.turns += 1

    # With the lock held

    def _add(self, known: _Known, tokens: int, censored: bool, when: float) -> None:
        growth = self._growth
        if self.settings.half_life_s and known.sketch.bins:
            growth /= self._faded(known.sketch, when)
        known.sketch.add(tokens, censored, growth, when)
        known.fresh += 1

    def _faded(self, sketch: Sketch, now: float) -> float:
        half_life_s = self.settings.half_life_s
        return 2.0 ** -min(max(now - sketch.last, 0.0) / half_life_s, 100.0) if half_life_s else 1.0

    def _prediction(self, keys: Sequence[Key]) -> Prediction | None:
        everything = self._all
        if not everything.sketch.bins:
            return None
        tables = []
        now = everything.sketch.last
        for key in keys:
            name = _name(key)
            known = self._keys.get(name)
            if known is not None and known.sketch.count >= self.settings.min_observations:
                self._keys.move_to_end(name)
                tables.append((known.survival(), self._faded(known.sketch, now)))
        tables.append((everything.survival(), 1.0))
        return Prediction(tables, self.settings.shrinkage, self.settings.tail_index)

    def _posterior(self, prediction: Prediction | None, group: str | None, running: Sequence[int]) -> Posterior | None:
        found = self._siblings.get(group) if group is not None else None
        if prediction is None or found is None:
            return None
        spread = prediction.spread()
        return Posterior(found, spread, self._siblings.correlation, running) if spread[1] > 0.0 else None


def _name(key: Key) -> Key:
    return key if len(key) <= _LONGEST_KEY else "~" + blake2b(key.encode(), digest_size=16).hexdigest()
