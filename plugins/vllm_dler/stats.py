"""What the scheduler counts. Plain numbers in the engine's process; the API server reads them, see `exporter`."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from typing import Any

from vllm_dler.arguments import DEFAULT, OTHER
from vllm_dler.order import Tracked
from vllm_dler.waits import Waits, quantile
from vllm_suite.compat.length_policy import End

QUANTILES = {"0.5": 0.5, "0.9": 0.9, "0.99": 0.99}
_ERRORS, _LATENCIES = 512, 256  # finished requests that quantiles look back on, the latter for each class

Rows = dict[str, list[list[Any]]]
"""By series: pairs of labels and value. Lists, because it crosses to another process as msgpack."""


class Stats:
    """Counters since the engine started, and windows of what ended last.

    Series are named as in `vllm_suite.metrics.SCHED` without prefix and ``_total``.
    """

    def __init__(self, max_labels: int) -> None:
        self._names: set[str] = set()
        self._max_labels = max_labels
        self._counts: dict[str, Counter[tuple[str, ...]]] = defaultdict(Counter)
        self._errors: deque[float] = deque(maxlen=_ERRORS)
        self._latencies: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATENCIES))

    def label(self, name: str | None) -> str:
        """The label of a class: clients name classes, so only the first ones keep their names."""
        if name is None:
            return DEFAULT
        if name not in self._names:
            if len(self._names) >= self._max_labels:
                return OTHER
            self._names.add(name)
        return name

    def count(self, series: str, *labels: str, amount: float = 1) -> None:
        self._counts[series][labels] += amount  # type: ignore[assignment]  # a Counter may hold fractions

    def finished(self, state: Tracked, end: End, tokens: int, now: float) -> None:
        """A request ended after ``tokens``."""
        label, seconds = state.label, max(now - state.arrival, 0.0)
        self.count("requests", label, end)
        if state.cut and end == "length":
            self.count("caps", label)
        if not tokens or end == "error":
            return
        self.count("output_tokens", label, amount=tokens)
        self.count("latency_seconds", label, amount=seconds)
        self._latencies[label].append(seconds / tokens)
        if end == "stop" and state.predicted is not None:
            self._errors.append(state.predicted - tokens)

    def report(self, waiting: Iterable[Tracked], waits: Waits, scale: tuple[str, float], now: float) -> dict[str, Rows]:
        """Everything as plain values: ``counters`` since the start, ``gauges`` now."""
        counters: Rows = {
            series: [[list(labels), float(value)] for labels, value in rows.items()]
            for series, rows in self._counts.items()
        }
        counters["overtakes"] = [[[], float(waits.overtakes)]]
        gauges: Rows = {scale[0]: [[[], scale[1]]]}
        lengths, ages = self._queue(waiting, now)
        gauges["queue_length"] = [[[label], float(count)] for label, count in lengths.items()]
        gauges["queue_age_seconds"] = [[[label], age] for label, age in ages.items()]
        if self._errors:
            gauges["length_error_tokens"] = [[[q], quantile(self._errors, share)] for q, share in QUANTILES.items()]
        gauges["normalised_latency_seconds"] = [
            [[label, q], quantile(values, share)]
            for label, values in self._latencies.items()
            for q, share in QUANTILES.items()
        ]
        tails = waits.tails(now)
        if tails is not None:
            gauges["wait_p99_seconds"] = [[["actual"], tails[0]], [["in_turn"], tails[1]]]
        return {"counters": counters, "gauges": gauges}

    def _queue(self, waiting: Iterable[Tracked], now: float) -> tuple[dict[str, int], dict[str, float]]:
        """Requests that wait and the age of the oldest, by class; 0 for classes of which none does."""
        known = [DEFAULT, *sorted(self._names), *([OTHER] if len(self._names) >= self._max_labels else [])]
        lengths, ages = dict.fromkeys(known, 0), dict.fromkeys(known, 0.0)
        for state in waiting:
            lengths[state.label] += 1
            ages[state.label] = max(ages[state.label], now - state.arrival)
        return lengths, ages
