"""What the connector reports, through vLLM's connector-stats channel.

Workers count into the same kind of container and send it over the control link; the scheduler's half adds
everything up and hands it to the engine's statistics on each step.
"""

from __future__ import annotations

import contextlib
from typing import Any

from prometheus_client import REGISTRY

from vllm_epd.item_server import ServerCounts
from vllm_epd.pool import PoolStats
from vllm_suite.compat.ec import ECConnectorPromMetrics, ECConnectorStats
from vllm_suite.metrics import EC, SeriesSpec

PREFIX = "vllm_suite_ec_"
_made: dict[str, Any] = {}
# Peers beyond this many share one label value.
MAX_PEERS = 1024

Counts = dict[str, dict[str, float]]


class SuiteECStats(ECConnectorStats):
    """Counts, gauges and observations since the last report.

    ``data`` holds plain values, because it crosses process borders as msgpack:
        counts: series (without prefix and ``_total``) -> label value, or "" -> number.
        gauges: the same, last value.
        seconds: series -> list of observations.
    """

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data=data or {})
        for name in ("counts", "gauges", "seconds"):
            self.data.setdefault(name, {})

    def count(self, series: str, label: str = "", amount: float = 1) -> None:
        by_label = self.data["counts"].setdefault(series, {})
        by_label[label] = by_label.get(label, 0) + amount

    def gauge(self, series: str, value: float, label: str = "") -> None:
        self.data["gauges"].setdefault(series, {})[label] = value

    def observe(self, series: str, seconds: float) -> None:
        self.data["seconds"].setdefault(series, []).append(seconds)

    def add(self, counts: Counts, gauges: Counts) -> None:
        """Take in what a worker counted."""
        for series, by_label in counts.items():
            for label, amount in by_label.items():
                self.count(series, label, amount)
        for series, by_label in gauges.items():
            self.data["gauges"].setdefault(series, {}).update(by_label)

    def reset(self) -> None:
        self.data: dict[str, Any] = {"counts": {}, "gauges": {}, "seconds": {}}

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def clone_and_reset(self) -> SuiteECStats:
        """What there is so far; counting starts anew."""
        old = SuiteECStats(self.data)
        self.reset()
        return old

    def aggregate(self, other: ECConnectorStats) -> SuiteECStats:
        self.add(other.data.get("counts", {}), other.data.get("gauges", {}))
        for series, values in other.data.get("seconds", {}).items():
            self.data["seconds"].setdefault(series, []).extend(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        """vLLM's log line."""
        counts = self.data["counts"]
        total = {name: sum(counts.get(name, {}).values()) for name in ("loads", "local_encodes", "refused")}
        return {
            "Num items loaded": int(total["loads"]),
            "Num items encoded locally": int(total["local_encodes"]),
            "Num refused references": int(total["refused"]),
            "Num items stored": int(sum(counts.get("encoded_items", {}).values())),
        }


def count_pool(stats: SuiteECStats, pool: PoolStats) -> None:
    """Add what the pool counted."""
    for series, by_label in (
        ("pool_hits", pool.hits),
        ("pool_evictions", pool.evictions),
        ("pool_demotions", pool.demotions),
        ("not_stored", pool.not_stored),
    ):
        for label, amount in by_label.items():
            stats.count(series, label, amount)
    for series, amount in (
        ("pool_misses", pool.misses),
        ("encoded_items", pool.stored_items),
        ("encoded_rows", pool.stored_rows),
    ):
        if amount:
            stats.count(series, "", amount)
    for fault, amount in (("expired_pin", pool.expired_pins), ("corrupt_item", pool.corrupt)):
        if amount:
            stats.count("contained_faults", fault, amount)
    for series, values in (
        ("pool_bytes", pool.used_bytes),
        ("pool_capacity_bytes", pool.capacity_bytes),
        ("pool_items", pool.items),
    ):
        for label, value in values.items():
            stats.gauge(series, value, label)
    stats.gauge("leases_outstanding", pool.pins)


def count_server(stats: SuiteECStats, server: ServerCounts) -> None:
    """Add what the item server counted."""
    for end, amount in (("read", server.released), ("given_up", server.given_up)):
        if amount:
            stats.count("served", end, amount)
    for reason, amount in server.refused.items():
        stats.count("claims_refused", reason, amount)
    for fault, amount in server.faults.items():
        stats.count("contained_faults", fault, amount)


class SuiteECPromMetrics(ECConnectorPromMetrics):
    """The ``vllm_suite_ec_*`` series of :mod:`vllm_suite.metrics`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._engine_labels = per_engine_labelvalues
        self._peers: set[str] = set()
        self._specs = {spec.name: spec for spec in EC}
        self._series = {spec.name: self._make(spec, labelnames) for spec in EC}
        for spec in EC:
            if not spec.labels:
                for engine_idx in per_engine_labelvalues:
                    self._child(spec.name, engine_idx)  # 0 from the start, so that rates have a first point

    def _make(self, spec: SeriesSpec, labelnames: list[str]) -> Any:
        if (old := _made.pop(spec.name, None)) is not None:
            # Another engine was built in this process before. vLLM drops only its own series then.
            with contextlib.suppress(KeyError):
                REGISTRY.unregister(old)
        _made[spec.name] = made = self._new(spec, labelnames)
        return made

    def _new(self, spec: SeriesSpec, labelnames: list[str]) -> Any:
        labels = [*labelnames, *spec.labels]
        if spec.kind == "gauge":
            return self._gauge_cls(
                name=spec.name, documentation=spec.help, labelnames=labels, multiprocess_mode="mostrecent"
            )
        if spec.kind == "histogram":
            return self._histogram_cls(
                name=spec.name, documentation=spec.help, labelnames=labels, buckets=list(spec.buckets)
            )
        return self._counter_cls(name=spec.name, documentation=spec.help, labelnames=labels)

    def _child(self, name: str, engine_idx: int, *values: object) -> Any:
        return self._series[name].labels(*self._engine_labels[engine_idx], *values)

    def _label(self, spec: SeriesSpec, value: str) -> tuple[str, ...]:
        if not spec.labels:
            return ()
        if spec.labels == ("peer",) and value not in self._peers:
            if len(self._peers) >= MAX_PEERS:
                return ("other",)
            self._peers.add(value)
        return (value[:128],)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for series, by_label in transfer_stats_data.get("counts", {}).items():
            spec = self._specs[f"{PREFIX}{series}_total"]
            for label, amount in by_label.items():
                self._child(spec.name, engine_idx, *self._label(spec, label)).inc(amount)
        for series, by_label in transfer_stats_data.get("gauges", {}).items():
            spec = self._specs[PREFIX + series]
            for label, value in by_label.items():
                self._child(spec.name, engine_idx, *self._label(spec, label)).set(value)
        for series, values in transfer_stats_data.get("seconds", {}).items():
            child = self._child(PREFIX + series, engine_idx)
            for value in values:
                child.observe(value)
