"""Whether the engine behind an API server answers, and how much work it has, read cheaply."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict

from vllm_suite.compat.own_series import OwnSeries

ENV_DEADLINE = "VLLM_SUITE_ENGINE_DEADLINE_S"
DEFAULT_DEADLINE_S = 10.0
"""An engine that has not answered for this long is not ready. It answers between two steps, so this must be
longer than the longest step, a full prefill chunk."""

PROBE_INTERVAL_S = 0.5
PROBE_WAIT_S = 0.1
HEALTH_DEADLINE_S = 0.5
MULTIPROCESS_CACHE_S = 0.5


@dataclass(frozen=True)
class Status:
    """``ready``: healthy, answering and neither asleep nor paused. ``paused``: vLLM's own pause is on."""

    ready: bool
    paused: bool


class Load(TypedDict, total=False):
    """Work in this instance.

    ``running`` and ``waiting`` are requests, ``kv_usage`` is the used fraction of the KV cache (of the fullest
    engine, under data parallelism), ``waiting_tokens`` the prompt tokens whose first output is outstanding (of this
    API server, where there are several).
    """

    running: int
    waiting: int
    kv_usage: float
    waiting_tokens: int


class EngineProbe:
    """Asks the engine core two small questions from time to time and remembers when it last answered.

    ``check_health()`` alone only says that no engine process was seen to die; a stopped or stuck one passes.
    """

    def __init__(
        self, client: Any, deadline_s: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._client = client
        self._deadline_s = answer_deadline_s() if deadline_s is None else deadline_s
        self._clock = clock
        self._task: asyncio.Task[tuple[bool, bool]] | None = None
        self._asked = float("-inf")
        self._answered = float("-inf")
        self._asleep = False
        self._paused = False

    async def status(self) -> Status:
        """Where things stand; takes at most HEALTH_DEADLINE_S + PROBE_WAIT_S."""
        healthy = await self._healthy()
        if healthy:
            await self._ask()
        answering = self._clock() - self._answered < self._deadline_s
        ready = healthy and answering and not self._asleep and not self._paused
        return Status(ready=ready, paused=self._paused)

    async def _healthy(self) -> bool:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await asyncio.wait_for(self._client.check_health(), HEALTH_DEADLINE_S)
        except (EngineDeadError, TimeoutError):
            return False
        return True

    async def _ask(self) -> None:
        now = self._clock()
        if self._task is None and now - self._asked >= PROBE_INTERVAL_S:
            self._asked = now
            self._task = asyncio.create_task(self._question())
            self._task.add_done_callback(self._note)
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=PROBE_WAIT_S)

    async def _question(self) -> tuple[bool, bool]:
        return await self._client.is_sleeping(), await self._client.is_paused()

    def _note(self, task: asyncio.Task[tuple[bool, bool]]) -> None:
        self._task = None
        # An error is no answer: the deadline runs on.
        if not task.cancelled() and task.exception() is None:
            self._asleep, self._paused = task.result()
            self._answered = self._clock()


def answer_deadline_s() -> float:
    """The operator's ``VLLM_SUITE_ENGINE_DEADLINE_S`` in seconds, or the default. Raises ValueError where it is
    not a positive number."""
    text = os.environ.get(ENV_DEADLINE) or str(DEFAULT_DEADLINE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{ENV_DEADLINE} must be a positive number of seconds, not {text!r}")
    return seconds


async def read_load(client: Any) -> Load:
    """What vLLM's gauges say, and the front end's own queue. Needs no engine call.

    The gauges are absent under ``--disable-log-stats``; their fields are then left out.
    """
    load: Load = {}
    queued_tokens = getattr(client, "get_num_queued_tokens", None)
    if queued_tokens is not None:
        load["waiting_tokens"] = queued_tokens()
    gauges = await _gauges.read({})
    if "vllm:num_requests_running" in gauges:
        load["running"] = int(sum(gauges["vllm:num_requests_running"]))
    if "vllm:num_requests_waiting" in gauges:
        load["waiting"] = int(sum(gauges["vllm:num_requests_waiting"]))
    if "vllm:kv_cache_usage_perc" in gauges:
        load["kv_usage"] = max(gauges["vllm:kv_cache_usage_perc"])
    return load


GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")


def _collect(registry: Any) -> dict[str, list[float]]:
    return {
        metric.name: [sample.value for sample in metric.samples]
        for metric in registry.collect()
        if metric.name in GAUGES and metric.samples
    }


_gauges = OwnSeries(GAUGES, _collect, MULTIPROCESS_CACHE_S)
