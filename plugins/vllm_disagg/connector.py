"""``SuiteNixlConnector``: vLLM's pull-based NIXL connector with fenced references, leases and deadlines."""

from __future__ import annotations

from typing import Any

from vllm_disagg.config import ConfigError, DisaggConfig
from vllm_disagg.exchange import WorkerReports
from vllm_disagg.scheduler import SuitePullScheduler
from vllm_disagg.stats import SuiteKVStats, SuitePromMetrics
from vllm_disagg.worker import SuitePullWorker
from vllm_suite.compat import engine_idle, role_limits, role_queue
from vllm_suite.compat.nixl import KVConnectorRole, NixlPullConnector


class SuiteNixlConnector(NixlPullConnector):
    """Name it in ``--kv-transfer-config``, or let ``--plugins disagg`` do so.

    Built by vLLM once in the scheduler's process and once in each worker. Transfers themselves are upstream's.

    Raises:
        ConfigError: settings that cannot work together, found at start-up.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        config = DisaggConfig.from_extra_config(transfer.kv_connector_extra_config or {})
        _refuse_unsupported(vllm_config)
        # The grandparent builds upstream's halves, which open an agent each; ours are built below instead.
        configured_role = transfer.kv_role
        try:
            # Direction is per request here, so "both" is no mistake; upstream warns that it is deprecated.
            if configured_role == "kv_both":
                transfer.kv_role = "kv_consumer"
            super(NixlPullConnector, self).__init__(vllm_config, role, kv_cache_config)
        finally:
            transfer.kv_role = configured_role
        if role == KVConnectorRole.SCHEDULER:
            engine_idle.install()
            role_limits.install()
            role_queue.install()
            self.connector_scheduler = SuitePullScheduler(vllm_config, self.engine_id, kv_cache_config, config)
        else:
            self.connector_worker = SuitePullWorker(vllm_config, self.engine_id, kv_cache_config, config)

    # --- hooks of vllm_suite.compat.engine_idle ---

    def set_wake(self, wake: Any) -> None:
        self.connector_scheduler.set_wake(wake)

    def idle_wait_s(self, unfinished: bool) -> float:
        return self.connector_scheduler.idle_wait_s(unfinished)

    # --- stats ---

    def build_connector_worker_meta(self) -> WorkerReports | None:
        reports: WorkerReports | None = self.connector_worker.take_reports()
        return reports

    def get_kv_connector_stats(self) -> Any:
        if self.connector_scheduler is not None:
            return self.connector_scheduler.take_stats()
        return super().get_kv_connector_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SuiteKVStats:
        return SuiteKVStats(data=data) if data is not None else SuiteKVStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> SuitePromMetrics:
        return SuitePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _refuse_unsupported(vllm_config: Any) -> None:
    """What the fence does not cover is refused here; what NIXL cannot do is refused by upstream's own checks."""
    parallel = vllm_config.parallel_config
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise ConfigError(
                f"SuiteNixlConnector: {name} > 1 is not supported; use 1, or vLLM's NixlConnector without the fence"
            )
