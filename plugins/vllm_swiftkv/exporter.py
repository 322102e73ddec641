"""The ``vllm_suite_swiftkv_*`` series at the API server's ``/metrics``: counters of the workers, read every two
seconds over vLLM's ``collective_rpc``.

Only a server whose model skips polls, and of several API servers only the first. What the workers counted before the
first reading, warm-up steps above all, is left out.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import logging
from typing import Any

from prometheus_client import Counter, Gauge

from vllm_suite.compat.engine_state import answer_deadline_s
from vllm_suite.compat.worker_calls import EngineGone, call_workers, is_first_server
from vllm_suite.metrics import SWIFTKV
from vllm_swiftkv.options import EXTENSION, is_swiftkv
from vllm_swiftkv.settings import SwiftKVSettings

METHOD = "swiftkv_counters"
PERIOD_S = 2.0

_PREFIX = "vllm_suite_swiftkv_"
_COUNTED = ("prompt_tokens", "head_tokens", "tail_rows", "steps")
_log = logging.getLogger("vllm.suite")

Totals = dict[str, int]


class SwiftKVExporter:
    """What the control endpoint makes in each API server; see :mod:`vllm_suite.compat.endpoint`."""

    def __init__(self, client: Any, period_s: float = PERIOD_S, deadline_s: float | None = None) -> None:
        self._client = client
        self._config = config = client.vllm_config
        self._settings = SwiftKVSettings.of(config)
        self._model_name = str(config.model_config.served_model_name)
        self._period_s = period_s
        self._deadline_s = answer_deadline_s() if deadline_s is None else deadline_s
        self._last: dict[int, Totals] = {}
        self._sums: dict[int, Totals] = {}
        self._failing = False

    def facts(self) -> dict[str, Any]:
        """Added to ``/suite/v1/state``."""
        return {"prefill_only": self._settings.prefill_only}

    async def run(self) -> None:
        """Read and export until the engine has ended; returns at once where there is nothing to read."""
        if not self._counts_here():
            return
        engines = list(self._client.engine_core.engine_ranks_managed)
        armed = bool(self._config.cache_config.kv_sharing_fast_prefill)
        for engine in engines:
            _set("armed", self._labels(engine), int(armed))
        if not armed or not self._has_extension():
            return
        while True:
            try:
                readings = await self._ask()
            except EngineGone:
                return
            if readings is not None:
                self._export(readings)
            await asyncio.sleep(self._period_s)

    def _counts_here(self) -> bool:
        named = self._config.model_config.architectures
        return is_swiftkv({"architectures": named}) and is_first_server(self._config)

    def _has_extension(self) -> bool:
        path = self._config.parallel_config.worker_extension_cls
        if path == EXTENSION:
            return True
        module, _, name = path.rpartition(".")
        try:
            found = bool(module) and hasattr(getattr(importlib.import_module(module), name, None), METHOD)
        except ImportError:
            found = False
        if not found:
            _log.warning(
                "vllm-suite: swiftkv: --worker-extension-cls %r has no %s, so skipped tokens are not counted; derive "
                "it from %s",
                *(path, METHOD, EXTENSION),
            )
        return found

    async def _ask(self) -> dict[int, Totals] | None:
        """The workers' counters by engine; None where they could not be had. One question at a time."""
        task = asyncio.create_task(self._read())
        try:
            while not (await asyncio.wait({task}, timeout=self._deadline_s))[0]:
                self._failed("timeout", f"no answer within {self._deadline_s:g} s")
                if self._client.errored:
                    raise EngineGone
            readings = task.result()
        except EngineGone:
            raise
        except Exception as error:  # noqa: BLE001  vLLM raises bare exceptions for what failed in a worker
            self._failed("error", repr(error))
            return None
        finally:
            task.cancel()
        self._failing = False
        return readings

    async def _read(self) -> dict[int, Totals]:
        answers = await call_workers(self._client, METHOD)
        # Tensor-parallel workers count the same steps, so they are not added up.
        return {
            engine: {key: max(int(worker[key]) for worker in workers) for key in _COUNTED}
            for engine, workers in answers.items()
        }

    def _failed(self, reason: str, text: str) -> None:
        engine = next(iter(self._client.engine_core.engine_ranks_managed))
        _add("poll_failures_total", (*self._labels(engine), reason), 1)
        if not self._failing:
            _log.warning("vllm-suite: swiftkv: the workers' counters cannot be read: %s", text)
        self._failing = True

    def _export(self, readings: dict[int, Totals]) -> None:
        for engine, now in readings.items():
            before = self._last.get(engine, now)
            self._last[engine] = now
            restarted = now["steps"] < before["steps"]
            grown = {key: now[key] - (0 if restarted else before[key]) for key in _COUNTED}
            sums = self._sums.setdefault(engine, dict.fromkeys(_COUNTED, 0))
            for key in _COUNTED:
                sums[key] += grown[key]
                _add(f"{key}_total", self._labels(engine), grown[key])
            _add("skipped_tokens_total", self._labels(engine), max(0, grown["head_tokens"] - grown["tail_rows"]))
            if sums["head_tokens"]:
                ratio = 1 - sums["tail_rows"] / sums["head_tokens"]
                _set("skip_ratio", self._labels(engine), max(0.0, ratio))

    def _labels(self, engine: int) -> tuple[str, str]:
        return self._model_name, str(engine)


@functools.cache
def _series() -> dict[str, Any]:
    made: dict[str, Any] = {}
    for spec in SWIFTKV:
        labels = ["model_name", "engine", *spec.labels]
        made[spec.name.removeprefix(_PREFIX)] = (
            Gauge(spec.name, spec.help, labels, multiprocess_mode="mostrecent")
            if spec.kind == "gauge"
            else Counter(spec.name, spec.help, labels)
        )
    return made


def _add(name: str, labels: tuple[str, ...], amount: int) -> None:
    _series()[name].labels(*labels).inc(amount)


def _set(name: str, labels: tuple[str, ...], value: float) -> None:
    _series()[name].labels(*labels).set(value)
