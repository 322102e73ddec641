"""The ``vllm_suite_sched_*`` series at the API server's ``/metrics``: counters of the schedulers, read every two
seconds over vLLM's utility channel.

The scheduler lives in the engine core, which is another process. Of several API servers only the first one reads.
"""

from __future__ import annotations

from typing import Any

from vllm_dler.config import SchedulerSettings
from vllm_dler.options import OWN_SCHEDULER, SCHEDULER
from vllm_suite.compat.engine_calls import call_engines
from vllm_suite.compat.length_policy import REPORT_METHOD
from vllm_suite.compat.polled_series import PolledSeries
from vllm_suite.compat.worker_calls import is_first_server
from vllm_suite.metrics import SCHED

PERIOD_S = 2.0

Report = dict[str, dict[str, list[Any]]]


class DlerExporter:
    """What the control endpoint makes in each API server; see :mod:`vllm_suite.compat.endpoint`."""

    def __init__(self, client: Any, period_s: float = PERIOD_S, deadline_s: float | None = None) -> None:
        self._client = client
        config = client.vllm_config
        named = config.scheduler_config.scheduler_cls
        self._ours = named in (SCHEDULER, OWN_SCHEDULER)
        self._active = self._ours and SchedulerSettings.of(config).reorders
        self._first = is_first_server(config)
        self._series: PolledSeries[dict[int, Report]] = PolledSeries(
            client, SCHED, "vllm_suite_sched_", self._read, "dler: the scheduler's counters", period_s, deadline_s
        )
        self._last: dict[tuple[int, str, tuple[str, ...]], float] = {}

    def facts(self) -> dict[str, Any]:
        """Added to ``/suite/v1/state``: whether requests are ordered by length here."""
        return {"length_aware": self._active}

    async def run(self) -> None:
        """Read and export until the engine has ended; returns at once where the scheduler is another one."""
        if not self._first:
            return
        for engine in self._client.engine_core.engine_ranks_managed:
            self._series.at("active", engine).set(int(self._active))
        if not self._ours:
            return
        self._series.start_at_zero("boosts_total", "evictions_total")
        async for reports in self._series.readings():
            for engine, report in reports.items():
                self._export(engine, report)

    async def _read(self) -> dict[int, Report]:
        return await call_engines(self._client, REPORT_METHOD)

    def _export(self, engine: int, report: Report) -> None:
        for series, rows in report["counters"].items():
            for labels, total in rows:
                key = (engine, series, tuple(labels))
                grown = total - self._last.get(key, 0.0)
                self._last[key] = total
                self._series.at(f"{series}_total", engine, *labels).inc(max(grown, 0.0))
        for series, rows in report["gauges"].items():
            for labels, value in rows:
                self._series.at(series, engine, *labels).set(value)
