"""What the connector reports, through vLLM's connector-stats channel.

Workers count into the same kind of container and send it over the control link; the scheduler's half adds
everything up and hands it to the engine's statistics on each step.
"""

from __future__ import annotations

from typing import Any

from vllm_epd.item_server import ServerCounts
from vllm_epd.pool_stats import PoolStats
from vllm_suite.compat.ec import ECConnectorPromMetrics, ECConnectorStats
from vllm_suite.engine_series import EngineSeries, MetricClasses
from vllm_suite.metrics import EC

PREFIX = "vllm_suite_ec_"
LEASES = "leases_outstanding"

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
    stats.gauge(LEASES, pool.pins + pool.unread)


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
        classes = MetricClasses(self._counter_cls, self._gauge_cls, self._histogram_cls)
        self.series = EngineSeries(EC, classes, labelnames, per_engine_labelvalues)
        # Gauges of tiers that there are not stay away.
        self.series.start_at_zero(
            spec.name
            for spec in EC
            if all(label.values for label in spec.labels) and not (spec.kind == "gauge" and spec.labels)
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        series, data = self.series, transfer_stats_data
        for short, by_label in data.get("counts", {}).items():
            name = f"{PREFIX}{short}_total"
            for label, amount in by_label.items():
                series.child(name, engine_idx, *series.labels(name, label)).inc(amount)
        for short, by_label in data.get("gauges", {}).items():
            name = PREFIX + short
            for label, value in by_label.items():
                series.child(name, engine_idx, *series.labels(name, label)).set(value)
        for short, values in data.get("seconds", {}).items():
            child = series.child(PREFIX + short, engine_idx)
            for value in values:
                child.observe(value)
