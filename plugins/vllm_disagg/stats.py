"""What the connector reports, through vLLM's connector-stats channel, beside vLLM's own NIXL series.

Scheduler and worker halves record into the same kind of container; vLLM adds them up on each engine step and
hands the sum to the API server's ``/metrics``.
"""

from __future__ import annotations

from typing import Any

from vllm_disagg.exchange import PullReport
from vllm_disagg.leases import End, Ended
from vllm_suite.compat.nixl import KVConnectorStats, NixlKVConnectorStats, NixlPromMetrics
from vllm_suite.engine_series import EngineSeries, MetricClasses
from vllm_suite.metrics import KV
from vllm_suite.metrics.connectors import DEADLINES

# Lists of plain values: they cross process borders as msgpack.
_OWN = (
    "suite_pulls",
    "suite_stages",
    "suite_served",
    "suite_recomputes",
    "suite_refused",
    "suite_leases_ended",
    "suite_leases",
    "suite_faults",
)


class SuiteKVStats(NixlKVConnectorStats):
    """vLLM's transfer telemetry, and the suite's outcomes.

    Own lists in ``data``:
        suite_pulls: ``[outcome, peer, bytes, blocks, seconds]`` per ended pull.
        suite_stages: ``[stage, seconds]`` per stage of a request that ended here.
        suite_served: ``[consumer, bytes, blocks]`` per lease that was pulled: what its reference offered. A
            consumer that had a prefix cached pulled less.
        suite_recomputes: reason per request that computed its prompt locally instead.
        suite_refused: reason per refused reference.
        suite_leases_ended: ``[end, seconds held]`` per lease.
        suite_leases: leases outstanding; the last value counts.
        suite_faults: name per contained fault that would have ended the engine.
    """

    def refused(self, reason: str, *, recomputed: bool) -> None:
        """A reference was refused; ``recomputed``: its request computes its prompt instead."""
        self.data["suite_refused"].append(reason)
        if recomputed:
            self.data["suite_recomputes"].append(reason)

    def pulled(self, report: PullReport | None, *, failed: bool, recomputed: bool) -> None:
        """A pull has ended on all ranks; no ``report`` where none of them got to begin it."""
        peer, size, blocks, seconds = ("", 0, 0, 0.0)
        if report is not None:
            peer, size, blocks, seconds = report.peer, report.size, report.blocks, report.seconds
        outcome = "ok" if not failed else "recomputed" if recomputed else "failed"
        self.data["suite_pulls"].append([outcome, peer, size, blocks, seconds])
        if failed and recomputed:
            reason = report.failure if report is not None and report.failure else "transfer_error"
            self.data["suite_recomputes"].append(reason)

    def staged(self, stage: str, seconds: float) -> None:
        """A request has been through a stage."""
        self.data["suite_stages"].append([stage, seconds])

    def lease_ended(self, ended: Ended, block_bytes: int) -> None:
        """A lease has ended on this producer."""
        self.data["suite_leases_ended"].append([ended.end.value, ended.held_s])
        if ended.end is End.PULLED and ended.consumer:
            self.data["suite_served"].append([ended.consumer, ended.blocks * block_bytes, ended.blocks])

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
        classes = MetricClasses(self._counter_cls, self._gauge_cls, self._histogram_cls)
        self.series = EngineSeries(KV, classes, labelnames, per_engine_labelvalues)
        self.series.start_at_zero(spec.name for spec in KV if all(label.values for label in spec.labels))
        for reason in DEADLINES:
            for engine_idx in per_engine_labelvalues:
                self.series.child("vllm_suite_kv_recomputes_total", engine_idx, reason)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        series, data = self.series, transfer_stats_data
        for outcome, peer, size, blocks, seconds in data.get("suite_pulls", ()):
            series.child("vllm_suite_kv_pulls_total", engine_idx, outcome).inc()
            if outcome == "ok":
                peer = series.peer(peer)
                series.child("vllm_suite_kv_pull_bytes_total", engine_idx, peer, "in").inc(size)
                series.child("vllm_suite_kv_pull_blocks_total", engine_idx, peer, "in").inc(blocks)
                series.child("vllm_suite_kv_pull_seconds", engine_idx, peer, "in").observe(seconds)
        for stage, seconds in data.get("suite_stages", ()):
            series.child("vllm_suite_kv_stage_seconds", engine_idx, stage).observe(seconds)
        for peer, size, blocks in data.get("suite_served", ()):
            peer = series.peer(peer)
            series.child("vllm_suite_kv_pull_bytes_total", engine_idx, peer, "out").inc(size)
            series.child("vllm_suite_kv_pull_blocks_total", engine_idx, peer, "out").inc(blocks)
        for reason in data.get("suite_recomputes", ()):
            series.child("vllm_suite_kv_recomputes_total", engine_idx, reason).inc()
        for reason in data.get("suite_refused", ()):
            series.child("vllm_suite_kv_refused_total", engine_idx, reason).inc()
        for end, held_s in data.get("suite_leases_ended", ()):
            series.child("vllm_suite_kv_leases_total", engine_idx, end).inc()
            series.child("vllm_suite_kv_held_seconds", engine_idx).observe(held_s)
        for fault in data.get("suite_faults", ()):
            series.child("vllm_suite_kv_contained_faults_total", engine_idx, fault).inc()
        if leases := data.get("suite_leases"):
            series.child("vllm_suite_kv_leases_outstanding", engine_idx).set(leases[-1])
