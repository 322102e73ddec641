"""What the connector reports, through vLLM's connector-stats channel, beside vLLM's own NIXL series.

Scheduler and worker halves record into the same kind of container; vLLM adds them up on each engine step and
hands the sum to the API server's ``/metrics``.
"""

from __future__ import annotations

import contextlib
from typing import Any

from prometheus_client import REGISTRY

from vllm_suite.compat.nixl import (
    KVConnectorStats,
    NixlKVConnectorStats,
    NixlPromMetrics,
    create_metric_per_engine,
)
from vllm_suite.metrics import KV, SeriesSpec

# Lists of plain values: they cross process borders as msgpack.
_OWN = (
    "suite_pulls",
    "suite_served",
    "suite_recomputes",
    "suite_refused",
    "suite_leases_ended",
    "suite_leases",
    "suite_faults",
)
_made: dict[str, Any] = {}
# Peers beyond this many share one label value.
MAX_PEERS = 1024


class SuiteKVStats(NixlKVConnectorStats):
    """vLLM's transfer telemetry, and the suite's outcomes.

    Own lists in ``data``:
        suite_pulls: ``[outcome, peer, bytes, blocks, seconds]`` per ended pull.
        suite_served: ``[consumer, bytes, blocks]`` per lease that was pulled: what its reference offered. A
            consumer that had a prefix cached pulled less.
        suite_recomputes: reason per request that computed its prompt locally instead.
        suite_refused: reason per refused reference.
        suite_leases_ended: ``[end, seconds held]`` per lease.
        suite_leases: leases outstanding; the last value counts.
        suite_faults: name per contained fault that would have ended the engine.
    """

    def reset(self) -> None:
        super().reset()
        for name in _OWN:
            self.data[name] = []

    def is_empty(self) -> bool:
        return super().is_empty() and not any(self.data[name] for name in _OWN)

    def clone_and_reset(self) -> SuiteKVStats:
        """The stats so far; counting starts anew."""
        old = SuiteKVStats(data=self.data)
        self.reset()
        return old

    def aggregate(self, other: KVConnectorStats) -> SuiteKVStats:
        if not other.is_empty():
            for name, values in other.data.items():
                self.data.setdefault(name, []).extend(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        """vLLM's log line, with the recomputes beside it."""
        line: dict[str, int | float] = dict(super().reduce())
        line["Num recomputed"] = len(self.data["suite_recomputes"])
        line["Num refused references"] = len(self.data["suite_refused"])
        return line


class SuitePromMetrics(NixlPromMetrics):
    """vLLM's NIXL series and the ``vllm_suite_kv_*`` series of :mod:`vllm_suite.metrics`."""

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
        self._series = {spec.name: self._make(spec, labelnames) for spec in KV}
        leases = self._series["vllm_suite_kv_leases_outstanding"]
        self._leases = create_metric_per_engine(leases, per_engine_labelvalues)

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

    def _peer_label(self, peer: str) -> str:
        if peer not in self._peers:
            if len(self._peers) >= MAX_PEERS:
                return "other"
            self._peers.add(peer)
        return peer[:128]

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        data = transfer_stats_data
        for outcome, peer, size, blocks, seconds in data.get("suite_pulls", ()):
            self._child("vllm_suite_kv_pulls_total", engine_idx, outcome).inc()
            if outcome == "ok":
                peer = self._peer_label(peer)
                self._child("vllm_suite_kv_pull_bytes_total", engine_idx, peer, "in").inc(size)
                self._child("vllm_suite_kv_pull_blocks_total", engine_idx, peer, "in").inc(blocks)
                self._child("vllm_suite_kv_pull_seconds", engine_idx, peer, "in").observe(seconds)
        for peer, size, blocks in data.get("suite_served", ()):
            peer = self._peer_label(peer)
            self._child("vllm_suite_kv_pull_bytes_total", engine_idx, peer, "out").inc(size)
            self._child("vllm_suite_kv_pull_blocks_total", engine_idx, peer, "out").inc(blocks)
        for reason in data.get("suite_recomputes", ()):
            self._child("vllm_suite_kv_recomputes_total", engine_idx, reason).inc()
        for reason in data.get("suite_refused", ()):
            self._child("vllm_suite_kv_refused_total", engine_idx, reason).inc()
        for end, held_s in data.get("suite_leases_ended", ()):
            self._child("vllm_suite_kv_leases_total", engine_idx, end).inc()
            self._child("vllm_suite_kv_held_seconds", engine_idx).observe(held_s)
        for fault in data.get("suite_faults", ()):
            self._child("vllm_suite_kv_contained_faults_total", engine_idx, fault).inc()
        if leases := data.get("suite_leases"):
            self._leases[engine_idx].set(leases[-1])
