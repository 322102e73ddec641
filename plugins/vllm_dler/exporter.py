"""The ``vllm_suite_sched_*`` series at the API server's ``/metrics``: counters of the schedulers, read every two
seconds over vLLM's utility channel.

The scheduler lives in the engine core, which is another process. Of several API servers only the first one reads.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

from prometheus_client import Counter, Gauge

from vllm_dler.config import SchedulerSettings
from vllm_dler.options import OWN_SCHEDULER, SCHEDULER
from vllm_suite.compat.engine_calls import call_engines
from vllm_suite.compat.engine_state import answer_deadline_s
from vllm_suite.compat.length_policy import REPORT_METHOD
from vllm_suite.compat.worker_calls import EngineGone, is_first_server
from vllm_suite.metrics import SCHED

PERIOD_S = 2.0

_PREFIX = "vllm_suite_sched_"
_log = logging.getLogger("vllm.suite")

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
        self._model_name = str(config.model_config.served_model_name)
        self._period_s = period_s
        self._deadline_s = answer_deadline_s() if deadline_s is None else deadline_s
        self._last: dict[tuple[int, str, tuple[str, ...]], float] = {}
        self._failing = False

    def facts(self) -> dict[str, Any]:
        """Added to ``/suite/v1/state``: whether requests are ordered by length here."""
        return {"length_aware": self._active}

    async def run(self) -> None:
        """Read and export until the engine has ended; returns at once where the scheduler is another one."""
        if not self._first:
            return
        for engine in self._client.engine_core.engine_ranks_managed:
            self._series("active", engine).set(int(self._active))
        if not self._ours:
            return
        while True:
            try:
                reports = await self._ask()
            except EngineGone:
                return
            for engine, report in (reports or {}).items():
                self._export(engine, report)
            await asyncio.sleep(self._period_s)

    async def _ask(self) -> dict[int, Report] | None:
        """What the schedulers counted, by engine; None where it could not be had. One question at a time."""
        task = asyncio.create_task(call_engines(self._client, REPORT_METHOD))
        try:
            while not (await asyncio.wait({task}, timeout=self._deadline_s))[0]:
                self._failed("timeout", f"no answer within {self._deadline_s:g} s")
                if self._client.errored:
                    raise EngineGone
            reports = task.result()
        except EngineGone:
            raise
        except Exception as error:  # noqa: BLE001  vLLM raises bare exceptions for what failed in the engine core
            self._failed("error", repr(error))
            return None
        finally:
            task.cancel()
        self._failing = False
        return reports

    def _failed(self, reason: str, text: str) -> None:
        engine = next(iter(self._client.engine_core.engine_ranks_managed))
        self._series("poll_failures_total", engine, reason).inc()
        if not self._failing:
            _log.warning("vllm-suite: dler: the scheduler's counters cannot be read: %s", text)
        self._failing = True

    def _export(self, engine: int, report: Report) -> None:
        for series, rows in report["counters"].items():
            for labels, total in rows:
                key = (engine, series, tuple(labels))
                grown = total - self._last.get(key, 0.0)
                self._last[key] = total
                self._series(f"{series}_total", engine, *labels).inc(max(grown, 0.0))
        for series, rows in report["gauges"].items():
            for labels, value in rows:
                self._series(series, engine, *labels).set(value)

    def _series(self, name: str, engine: int, *labels: str) -> Any:
        return _series()[name].labels(self._model_name, str(engine), *labels)


@functools.cache
def _series() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for spec in SCHED:
        labels = ["model_name", "engine", *spec.labels]
        made[spec.name.removeprefix(_PREFIX)] = (
            Gauge(spec.name, spec.help, labels, multiprocess_mode="mostrecent")
            if spec.kind == "gauge"
            else Counter(spec.name, spec.help, labels)
        )
    return made
