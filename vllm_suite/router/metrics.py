"""Every series of the router in one table.

The event loop is the only writer, so counts live in plain dictionaries without locks and become Prometheus
families at the scrape. That makes an increment some ten times cheaper, and an instance that left leaves no series.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vllm_suite.router.members import Pool

PREFIX = "vllm_suite_router_"


class _Series(NamedTuple):
    name: str
    help: str
    labels: tuple[str, ...]


COUNTERS = (
    _Series("requests", "Requests answered, by status code", ("endpoint", "code")),
    _Series("decisions", "Whether prefill ran on another instance, and why", ("path", "reason")),
    _Series("picks", "Instances chosen", ("stage", "instance")),
    _Series("recoveries", "Steps taken after a failure", ("step", "reason")),
    _Series("upstream_errors", "Failed attempts on instances", ("stage", "kind")),
    _Series("timeouts", "Deadlines passed", ("stage",)),
    _Series("stream_errors", "Answers that broke off after their first byte", ("reason",)),
    _Series("client_disconnects", "Clients that left before the end", ("stage",)),
    _Series("rejected", "Requests refused by the router itself", ("reason",)),
    _Series("stripped", "Fields and headers from outside that were not let through", ("what",)),
    _Series("waits", "Requests that waited for a ready instance", ("outcome",)),
    _Series("membership_events", "Changes of membership", ("event",)),
    _Series("lengths", "Answers by whether their length was learned: exact, censored or unknown", ("kind",)),
    _Series("length_state", "Reads and writes of the file of learned lengths", ("step", "outcome")),
    _Series("encode_items", "Media items of requests by what became of them", ("modality", "outcome")),
    _Series("encode_shared_items", "Items that were already being encoded for another request", ("modality",)),
    _Series("encode_slices", "Slices of items by what became of them", ("modality", "outcome")),
    _Series("encode_tokens", "Encoder tokens demanded, estimated: what encoders are scaled by", ("modality",)),
    _Series("encode_bytes", "Media bytes sent to encoders", ("modality",)),
    _Series("encode_fetched_bytes", "Media bytes fetched from URLs", ("modality",)),
    _Series("encode_requests", "Requests with media by how their items were provided", ("mode",)),
    _Series("encode_probes", "Questions to producers whether they still keep items", ("outcome",)),
)

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BOUNDS = (*(repr(bound) for bound in _SECONDS), "+Inf")

HISTOGRAMS = (
    _Series("request_seconds", "From the whole request read to the whole answer written", ("path",)),
    _Series("first_byte_seconds", "From the whole request read to the first byte of the answer", ("path",)),
    _Series("prefill_seconds", "Prefill attempts that gave a reference", ()),
    _Series("encode_queue_seconds", "Items' wait for room on their encoder", ()),
    _Series("encode_call_seconds", "Calls to encoders", ()),
    _Series("encode_item_seconds", "From an item's booking to its reference or failure, retries included", ()),
    _Series("encode_request_seconds", "What the stage took of requests that waited for it", ()),
    _Series("encode_admission_seconds", "Fetching, checking and hashing the media of a request", ()),
)

GAUGES = (
    _Series("instances", "Members by role and readiness", ("role", "ready")),
    _Series("outstanding_requests", "Requests the router has running on an instance", ("instance", "role")),
    _Series("outstanding_tokens", "Tokens estimated for them", ("instance", "role")),
    _Series("history_chunks", "Prompt chunks remembered of an instance", ("instance",)),
    _Series("outstanding_encode_tokens", "Encoder tokens sent to an instance or waiting for it", ("instance", "role")),
    _Series("encode_tokens_per_second", "Encoder tokens demanded, over about the last half minute", ()),
    _Series("encode_known_items", "Encoded items remembered with where they are kept", ()),
    _Series("requests_in_flight", "Requests inside the router", ()),
    _Series("draining", "1 after SIGTERM", ()),
    _Series("min_prompt_tokens", "Uncached prompt length from which prefill is disaggregated", ()),
    _Series("bytes_per_token", "Learned length of a token in text prompts", ()),
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

    def __init__(self, min_prompt_tokens: int, bytes_per_token: float) -> None:
        self.requests_in_flight = 0
        self.draining = False
        self.min_prompt_tokens = min_prompt_tokens
        self.bytes_per_token = bytes_per_token
        self.known_items = 0


class RouterMetrics(Collector):
    """What one router counts, and its registry."""

    def __init__(self, pool: Pool, live: Live) -> None:
        self.registry = CollectorRegistry()
        self._pool = pool
        self._live = live
        self._counts: dict[tuple[str, ...], int] = {}
        self._observed: dict[tuple[str, ...], _Observed] = {}
        self.encode_rate = Rate()
        self.registry.register(self)

    def count(self, *key: str) -> None:
        """Add one to a counter of `COUNTERS`: its name, then labels in the table's order."""
        self._counts[key] = self._counts.get(key, 0) + 1

    def add(self, amount: int, *key: str) -> None:
        """Add any amount to a counter."""
        self._counts[key] = self._counts.get(key, 0) + amount

    def observe(self, seconds: float, *key: str) -> None:
        """Add an observation to a histogram of `HISTOGRAMS`: its name, then labels."""
        observed = self._observed.get(key)
        if observed is None:
            observed = self._observed[key] = _Observed()
        observed.counts[bisect_left(_SECONDS, seconds)] += 1
        observed.total += seconds

    def member_event(self, event: str) -> None:
        """Count a change of membership, and drop the counts of instances that are gone."""
        self.count("membership_events", event)
        if event == "forgotten":
            known = {member.instance_id for member in self._pool.members}
            for key in [key for key in self._counts if key[0] == "picks" and key[2] not in known]:
                del self._counts[key]

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at each scrape."""
        counters = {
            series.name: CounterMetricFamily(PREFIX + series.name, series.help, labels=series.labels)
            for series in COUNTERS
        }
        for key, count in self._counts.items():
            counters[key[0]].add_metric(key[1:], count)
        histograms = {
            series.name: HistogramMetricFamily(PREFIX + series.name, series.help, labels=series.labels)
            for series in HISTOGRAMS
        }
        for key, observed in self._observed.items():
            sums = accumulate(observed.counts)
            buckets = [(bound, float(total)) for bound, total in zip(_BOUNDS, sums, strict=True)]
            histograms[key[0]].add_metric(key[1:], buckets, observed.total)
        return [*counters.values(), *histograms.values(), *self._gauges().values()]

    def _gauges(self) -> dict[str, GaugeMetricFamily]:
        families = {
            series.name: GaugeMetricFamily(PREFIX + series.name, series.help, labels=series.labels) for series in GAUGES
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
        for name in ("requests_in_flight", "draining", "min_prompt_tokens", "bytes_per_token"):
            families[name].add_metric((), float(getattr(self._live, name)))
        return families


class _Observed:
    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.total = 0.0
