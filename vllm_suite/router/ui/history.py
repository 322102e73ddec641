"""Percentiles and rates of the last minutes, from the router's own series.

A snapshot of the series is kept every STEP_S seconds; the difference of two of them is what happened between. Nothing
is added to a request for it, and whatever series the router has, these are they: the page and Prometheus agree.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vllm_suite.metrics.router import PREFIX
from vllm_suite.router.metrics import RouterMetrics

STEP_S = 5.0
SPAN_S = 300.0

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Histogram:
    """Cumulative counts by upper bound in seconds, the last bound infinite. Also a difference of two of them."""

    bounds: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()

    @property
    def count(self) -> int:
        """Observations."""
        return int(self.counts[-1]) if self.counts else 0

    def quantile(self, share: float) -> float | None:
        """Seconds, linear within a bucket as Prometheus' histogram_quantile is; None without observations."""
        if not self.count:
            return None
        rank = share * self.counts[-1]
        index = next(i for i, count in enumerate(self.counts) if count >= rank)
        if index == len(self.bounds) - 1:
            return self.bounds[-2]  # beyond the last finite bound nothing more is known
        low, below = (self.bounds[index - 1], self.counts[index - 1]) if index else (0.0, 0.0)
        inside = self.counts[index] - below
        return low + (self.bounds[index] - low) * ((rank - below) / inside if inside else 1.0)

    def share_below(self, seconds: float) -> float | None:
        """Share of the observations up to a limit, linear within its bucket; None without observations."""
        if not self.count:
            return None
        index = bisect_left(self.bounds, seconds)
        low, below = (self.bounds[index - 1], self.counts[index - 1]) if index else (0.0, 0.0)
        if index == len(self.bounds) - 1:
            return below / self.counts[-1]
        part = (seconds - low) / (self.bounds[index] - low)
        return (below + part * (self.counts[index] - below)) / self.counts[-1]

    def since(self, before: Histogram) -> Histogram:
        """What was observed after `before`."""
        if before.bounds != self.bounds:
            return self
        return Histogram(self.bounds, tuple(a - b for a, b in zip(self.counts, before.counts, strict=True)))


@dataclass(frozen=True)
class Snapshot:
    """The series at one moment of the monotonic clock. Names have neither prefix nor `_total`.

    A histogram stands for all its label values together; one with label `stage` also under `name/value` for each stage.
    """

    at: float
    counters: dict[tuple[str, Labels], float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def total(self, name: str, **labels: str) -> float:
        """Sum of a counter's samples that carry these labels."""
        wanted = set(labels.items())
        return sum(value for (key, found), value in self.counters.items() if key == name and wanted <= set(found))


def take(metrics: RouterMetrics, at: float, counters: Iterable[str], histograms: Iterable[str]) -> Snapshot:
    """Read the named series."""
    wanted, shapes = set(counters), set(histograms)
    counts: dict[tuple[str, Labels], float] = {}
    sums: dict[str, dict[float, float]] = {}
    for family in metrics.collect():
        name = family.name.removeprefix(PREFIX)
        if family.type == "counter" and name in wanted:
            for sample in family.samples:
                counts[name, tuple(sorted(sample.labels.items()))] = float(sample.value)
        elif family.type == "histogram" and name in shapes:
            for sample in family.samples:
                if not sample.name.endswith("_bucket"):
                    continue
                bound, stage = float(sample.labels["le"]), sample.labels.get("stage")
                for key in (name,) if stage is None else (name, f"{name}/{stage}"):
                    buckets = sums.setdefault(key, {})
                    buckets[bound] = buckets.get(bound, 0.0) + float(sample.value)
    found = {name: sorted(buckets.items()) for name, buckets in sums.items()}
    return Snapshot(
        at, counts, {name: Histogram(*map(tuple, zip(*pairs, strict=True))) for name, pairs in found.items()}
    )


class History:
    """Snapshots of the last SPAN_S seconds; `tick` adds one and is to be called every STEP_S."""

    def __init__(
        self,
        metrics: RouterMetrics,
        counters: Iterable[str],
        histograms: Iterable[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._counters = tuple(counters)
        self._histograms = tuple(histograms)
        self._clock = clock
        self._kept: deque[Snapshot] = deque([Snapshot(clock())])

    def now(self) -> Snapshot:
        """The series as they are."""
        return take(self._metrics, self._clock(), self._counters, self._histograms)

    def tick(self) -> None:
        """Keep a snapshot, and drop those that are too old."""
        self._kept.append(self.now())
        while self._kept[0].at < self._kept[-1].at - SPAN_S - STEP_S / 2:
            self._kept.popleft()

    def oldest(self) -> Snapshot:
        """The beginning of the window; at first the router's start, when every series was 0."""
        return self._kept[0]

    def last_step(self) -> tuple[Snapshot, Snapshot]:
        """The last two snapshots; call `tick` first."""
        return self._kept[-2], self._kept[-1]
