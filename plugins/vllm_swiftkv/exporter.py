"""The ``vllm_suite_swiftkv_*`` series at the API server's ``/metrics``: counters of the workers, read every two
seconds over vLLM's ``collective_rpc``.

Only a server whose model skips polls, and of several API servers only the first. What the workers counted before the
first reading, warm-up steps above all, is left out.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from vllm_suite.compat.polled_series import PolledSeries
from vllm_suite.compat.worker_calls import call_workers, is_first_server
from vllm_suite.metrics import SWIFTKV
from vllm_swiftkv.options import EXTENSION, is_swiftkv
from vllm_swiftkv.settings import SwiftKVSettings

METHOD = "swiftkv_counters"
PERIOD_S = 2.0

_COUNTED = ("prompt_tokens", "head_tokens", "tail_rows", "steps")
_log = logging.getLogger("vllm.suite")

Totals = dict[str, int]


class SwiftKVExporter:
    """What the control endpoint makes in each API server; see :mod:`vllm_suite.compat.endpoint`."""

    def __init__(self, client: Any, period_s: float = PERIOD_S, deadline_s: float | None = None) -> None:
        self._client = client
        self._config = config = client.vllm_config
        self._settings = SwiftKVSettings.of(config)
        self._series: PolledSeries[dict[int, Totals]] = PolledSeries(
            client, SWIFTKV, "vllm_suite_swiftkv_", self._read, "swiftkv: the workers' counters", period_s, deadline_s
        )
        self._last: dict[int, Totals] = {}
        self._sums: dict[int, Totals] = {}

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
            self._series.at("armed", engine).set(int(armed))
        if not armed or not self._has_extension():
            return
        async for readings in self._series.readings():
            self._export(readings)

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

    async def _read(self) -> dict[int, Totals]:
        answers = await call_workers(self._client, METHOD)
        # Tensor-parallel workers count the same steps, so they are not added up.
        return {
            engine: {key: max(int(worker[key]) for worker in workers) for key in _COUNTED}
            for engine, workers in answers.items()
        }

    def _export(self, readings: dict[int, Totals]) -> None:
        for engine, now in readings.items():
            before = self._last.get(engine, now)
            self._last[engine] = now
            restarted = now["steps"] < before["steps"]
            grown = {key: now[key] - (0 if restarted else before[key]) for key in _COUNTED}
            sums = self._sums.setdefault(engine, dict.fromkeys(_COUNTED, 0))
            for key in _COUNTED:
                sums[key] += grown[key]
                self._series.at(f"{key}_total", engine).inc(grown[key])
            skipped = max(0, grown["head_tokens"] - grown["tail_rows"])
            self._series.at("skipped_tokens_total", engine).inc(skipped)
            if sums["head_tokens"]:
                ratio = 1 - sums["tail_rows"] / sums["head_tokens"]
                self._series.at("skip_ratio", engine).set(max(0.0, ratio))
