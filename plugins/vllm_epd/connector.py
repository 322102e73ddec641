"""``SuiteECConnector``: encoder outputs from other instances, fenced, verified, read by NIXL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from vllm_epd.config import ConfigError, EpdConfig
from vllm_epd.exchange import StepPlan
from vllm_epd.scheduler import SuiteECScheduler
from vllm_epd.stats import SuiteECPromMetrics, SuiteECStats
from vllm_epd.worker import SuiteECWorker
from vllm_suite.compat import engine_idle
from vllm_suite.compat.ec import ECConnectorBase, ECConnectorRole

logger = logging.getLogger("vllm.suite.epd")


class SuiteECConnector(ECConnectorBase):
    """Name it in ``--ec-transfer-config``, or let ``--plugins epd`` do so.

    Built by vLLM once in the scheduler's process and once in each worker.

    Raises:
        ConfigError: settings that cannot work together, found at start-up.
    """

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        config = EpdConfig.from_extra_config(vllm_config.ec_transfer_config.ec_connector_extra_config or {})
        _refuse_unsupported(vllm_config)
        self._scheduler: SuiteECScheduler | None = None
        self._worker: SuiteECWorker | None = None
        if role == ECConnectorRole.SCHEDULER:
            engine_idle.install()
            self._scheduler = SuiteECScheduler(vllm_config, config)
        else:
            self._worker = SuiteECWorker(vllm_config, config)

    @property
    def scheduler(self) -> SuiteECScheduler:
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> SuiteECWorker:
        assert self._worker is not None
        return self._worker

    def shutdown(self) -> None:
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.shutdown()

    # --- worker ---

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self.worker.bind(connector_metadata)

    def start_save_caches(self, **kwargs: Any) -> None:
        self.worker.start_save_caches(kwargs["encoder_cache"])

    def start_load_caches(self, encoder_cache: dict[str, Any], **kwargs: Any) -> None:
        self.worker.start_load_caches(encoder_cache)

    def save_caches(self, encoder_cache: dict[str, Any], mm_hash: str, **kwargs: Any) -> None:
        self.worker.save_caches(encoder_cache, mm_hash)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self.worker.end_of_step()
        return None, None

    # --- scheduler ---

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        try:
            return self.scheduler.ensure_cache_available(request, num_computed_tokens)
        except Exception:
            logger.exception("epd: request %s: its items could not be looked at; it fails", request.request_id)
            self.scheduler.give_up(request.request_id)
            return False

    def has_cache_item(self, identifier: str) -> bool:
        return self.scheduler.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        self.scheduler.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: Any) -> StepPlan:
        return self.scheduler.build_connector_meta(scheduler_output)

    def take_unavailable_requests(self) -> set[str]:
        return self.scheduler.take_unavailable_requests()

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        try:
            return self.scheduler.request_finished(request)
        except Exception:
            logger.exception("epd: request %s: no answer about its items", request.request_id)
            self.scheduler.stats.count("contained_faults", "request_finished")
            return False, None

    def has_pending_push_work(self) -> bool:
        return self.scheduler.has_news()

    # --- hooks of vllm_suite.compat.engine_idle ---

    def set_wake(self, wake: Callable[[], None]) -> None:
        self.scheduler.set_wake(wake)

    def held_requests(self) -> int:
        return self.scheduler.held_requests()

    def idle_wait_s(self, unfinished: bool) -> float:
        return self.scheduler.idle_wait_s(unfinished)

    # --- stats ---

    def get_ec_connector_stats(self) -> SuiteECStats | None:
        """The workers' counts come over the control link, so only the scheduler's half has any."""
        return self._scheduler.take_stats() if self._scheduler is not None else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> SuiteECStats:
        return SuiteECStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> SuiteECPromMetrics:
        return SuiteECPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _refuse_unsupported(vllm_config: Any) -> None:
    parallel = vllm_config.parallel_config
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError("SuiteECConnector: pipeline parallelism is not supported; use --tensor-parallel-size")
    if vllm_config.model_config.is_encoder_decoder:
        raise ConfigError("SuiteECConnector: encoder-decoder models keep encoder outputs outside the encoder cache")
