"""The router's series, those of `vllm_suite.metrics.ROUTER`.

The event loop is the only writer, so counts live in plain dictionaries without locks and become Prometheus
families at the scrape. That makes an increment some ten times cheaper, and an instance that left leaves no series.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vllm_suite.metrics import ROUTER
from vllm_suite.metrics.router import PREFIX
from vllm_suite.router.members import Pool
from vllm_suite.router.recent import Recent
from vllm_suite.router.room import Room
from vllm_suite.router.targets import Targets

_SPECS = {spec.name.removeprefix(PREFIX).removesuffix("_total"): spec for spec in ROUTER}
_COUNTERS, _HISTOGRAMS, _GAUGES = (
    {name: spec for name, spec in _SPECS.items() if spec.kind == kind} for kind in ("counter", "histogram", "gauge")
)


class Rate:
    """A rate over about the last `span_s` seconds; older events fade out exponentially."""

    def __init__(self, span_s: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._span_s = span_s
        self._clock = clock
        self._at = clock()
        self._weight = 0.0

    def add(self, amount: float) -> None:
        """So much happened now."""
        self._weight = self._faded() + amount

    def per_second(self) -> float:
        """The rate as of now."""
        return self._faded() / self._span_s

    def _faded(self) -> float:
        now = self._clock()
        self._weight *= math.exp((self._at - now) / self._span_s)
        self._at = now
        return self._weight


class Live:
    """Numbers that gauges read at the scrape."""

    def __init__(self, min_prompt_tokens: int, bytes_per_token: float, room: Room | None = None) -> None:
        self.room = room or Room(0)
        self.requests_in_flight = 0
        self.draining = False
        self.min_prompt_tokens = min_prompt_tokens
        self.bytes_per_token = bytes_per_token
        self.known_items = 0


class RouterMetrics(Collector):
    """What one router counts, and its registry."""

    def __init__(self, pool: Pool, live: Live, targets: Targets | None = None) -> None:
        self.registry = CollectorRegistry()
        self._pool = pool
        self._live = live
        self._targets = targets or Targets()
        self._bounds = {name: spec.buckets for name, spec in _HISTOGRAMS.items()}
        for which, name in (("ttft_seconds", "ttft"), ("tpot_seconds", "tpot")):
            self._bounds[which] = tuple(sorted({*self._bounds[which], *self._targets.bounds_s(name)}))
        self._counts: dict[tuple[str, ...], int] = {}
        self._observed: dict[tuple[str, ...], _Observed] = {}
        self._later: list[tuple[str, ...]] = []
        self.encode_rate = Rate()
        self.recent = Recent()
        self.registry.register(self)

    def start_at_zero(self, but: Iterable[str] = ()) -> None:
        """Export the counters whose labels have closed sets, except those named: Prometheus misses no first count.

        Those of media wait for the first instance that makes or takes encoded items.
        """
        off = set(but)
        for name, spec in _COUNTERS.items():
            for values in spec.from_start():
                key = (name, *values)
                if name in off:
                    continue
                if any(word.startswith(("encode", "media")) for word in key):
                    self._later.append(key)
                else:
                    self._counts.setdefault(key, 0)

    def count(self, *key: str) -> None:
        """Add one to a counter: its name without prefix and ``_total``, then labels in the table's order."""
        self._counts[key] = self._counts.get(key, 0) + 1

    def add(self, amount: int, *key: str) -> None:
        """Add any amount to a counter."""
        self._counts[key] = self._counts.get(key, 0) + amount

    def observe(self, seconds: float, *key: str) -> None:
        """Add an observation to a histogram: its name without prefix, then labels."""
        observed = self._observed.get(key)
        if observed is None:
            observed = self._observed[key] = _Observed(self._bounds[key[0]])
        observed.counts[bisect_left(observed.bounds, seconds)] += 1
        observed.total += seconds

    def recovered(self, step: str, reason: str, instance: str = "", request: str = "") -> None:
        """Count a step of recovery, and keep when it was taken: `instance` is the one that failed, `request` an id."""
        self.count("recoveries", step, reason)
        self.recent.note("recovery", step, reason, instance, request)

    def member_event(self, event: str, instance: str = "") -> None:
        """Count a change of membership, and drop the counts of instances that are gone."""
        self.count("membership_events", event)
        self.recent.note("membership", event, "", instance)
        if event == "admitted" and any(one.makes_items or one.takes_items for one in self._pool.members):
            while self._later:
                self._counts.setdefault(self._later.pop(), 0)
        if event == "forgotten":
            known = {member.instance_id for member in self._pool.members}
            for key in [key for key in self._counts if key[0] == "picks" and key[2] not in known]:
                del self._counts[key]

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        counters = {
            name: CounterMetricFamily(PREFIX + name, spec.help, labels=spec.labels) for name, spec in _COUNTERS.items()
        }
        for key, count in self._counts.items():
            counters[key[0]].add_metric(key[1:], count)
        histograms = {
            name: HistogramMetricFamily(PREFIX + name, spec.help, labels=spec.labels)
            for name, spec in _HISTOGRAMS.items()
        }
        for key, observed in self._observed.items():
            histograms[key[0]].add_metric(key[1:], observed.buckets(), observed.total)
        return [*counters.values(), *histograms.values(), *self._gauges().values()]

    def _gauges(self) -> dict[str, GaugeMetricFamily]:
        families = {
            name: GaugeMetricFamily(PREFIX + name, spec.help, labels=spec.labels) for name, spec in _GAUGES.items()
        }
        counts: dict[tuple[str, str], int] = {}
        for member in self._pool.members:
            state = (member.role, "true" if member.ready else "false")
            counts[state] = counts.get(state, 0) + 1
            where = (member.instance_id, member.role)
            families["outstanding_requests"].add_metric(where, member.outstanding_requests)
            families["outstanding_tokens"].add_metric(where, member.outstanding_tokens)
            if member.role == "encode" or member.makes_items:
                families["outstanding_encode_tokens"].add_metric(where, member.encode_tokens)
            families["history_chunks"].add_metric(where[:1], len(member.history))
        for labels, count in counts.items():
            families["instances"].add_metric(labels, count)
        families["encode_tokens_per_second"].add_metric((), self.encode_rate.per_second())
        families["encode_known_items"].add_metric((), self._live.known_items)
        families["body_bytes"].add_metric((), self._live.room.held)
        for name in ("requests_in_flight", "draining", "min_prompt_tokens", "bytes_per_token"):
            families[name].add_metric((), float(getattr(self._live, name)))
        self._promised(families)
        return families

    def _promised(self, families: dict[str, GaugeMetricFamily]) -> None:
        slo = self._targets.slo
        for which, target in (("slo_ttft_seconds", slo.ttft), ("slo_tpot_seconds", slo.tpot)):
            if target is not None:
                families[which].add_metric((), target / 1000)
        if slo.ttft is not None or slo.tpot is not None:
            families["slo_attainment_ratio"].add_metric((), slo.attainment)
        for which, name in (("predicted_ttft_seconds", "ttft"), ("predicted_tpot_seconds", "tpot")):
            for quantile, bound, seconds in self._targets.predicted_s(name):
                families[which].add_metric((quantile, bound), seconds)
        predicted = self._targets.predicted
        if predicted is not None:
            families["predicted_requests_per_second"].add_metric((), predicted.rate)
            families["predicted_error_ratio"].add_metric((), predicted.error)


class _Observed:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many observations are below them."""
        names = (*map(repr, self.bounds), "+Inf")
        return [(name, float(total)) for name, total in zip(names, accumulate(self.counts), strict=True)]
