"""Series at an API server's ``/metrics`` that are read from its engines every few seconds."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from itertools import product
from typing import Any, Generic, TypeVar

from prometheus_client import Counter, Gauge

from vllm_suite.compat.engine_state import answer_deadline_s
from vllm_suite.compat.worker_calls import EngineGone
from vllm_suite.metrics import SeriesSpec

_log = logging.getLogger("vllm.suite")
Reading = TypeVar("Reading")


class PolledSeries(Generic[Reading]):
    """The series of one plugin, with ``model_name`` and ``engine`` in front of their own labels.

    Args:
        client: vLLM's engine client.
        specs, prefix: rows of :mod:`vllm_suite.metrics`, among them ``poll_failures_total``, and what their names
            have in common.
        ask: one question to all engines; raises EngineGone where they have ended.
        what: for the log, whose counters of what cannot be read.
        deadline_s: how long an answer may take until that is counted; it is waited for all the same.
    """

    def __init__(
        self,
        client: Any,
        specs: Iterable[SeriesSpec],
        prefix: str,
        ask: Callable[[], Awaitable[Reading]],
        what: str,
        period_s: float,
        deadline_s: float | None,
    ) -> None:
        self._client = client
        self._specs = tuple(specs)
        self._prefix = prefix
        self._ask = ask
        self._what = what
        self._model_name = str(client.vllm_config.model_config.served_model_name)
        self._period_s = period_s
        self._deadline_s = answer_deadline_s() if deadline_s is None else deadline_s
        self._failing = False

    def at(self, name: str, engine: int, *labels: str) -> Any:
        """A series of one engine; ``name`` is without the prefix."""
        return _made(self._specs)[self._prefix + name].labels(self._model_name, str(engine), *labels)

    def start_at_zero(self, *names: str) -> None:
        """Export these from now on with every value of their labels, which have closed sets of them.

        Of a counter that appears with its first count Prometheus sees no increase.
        """
        specs = {spec.name: spec for spec in self._specs}
        for name in names:
            sets = [label.values for label in specs[self._prefix + name].labels]
            for engine, values in product(self._client.engine_core.engine_ranks_managed, product(*sets)):
                self.at(name, engine, *values)

    async def readings(self) -> AsyncIterator[Reading]:
        """Every answer, until the engines have ended. What fails is counted, and said once per streak."""
        self.start_at_zero("poll_failures_total")
        while True:
            try:
                reading = await self._one()
            except EngineGone:
                return
            if reading is not None:
                yield reading
            await asyncio.sleep(self._period_s)

    async def _one(self) -> Reading | None:
        """None where it could not be had. One question at a time."""
        task = asyncio.ensure_future(self._ask())
        try:
            while not (await asyncio.wait({task}, timeout=self._deadline_s))[0]:
                self._failed("timeout", f"no answer within {self._deadline_s:g} s")
                if self._client.errored:
                    raise EngineGone
            reading = task.result()
        except EngineGone:
            raise
        except Exception as error:  # noqa: BLE001  vLLM raises bare exceptions for what failed in a worker or the core
            self._failed("error", repr(error))
            return None
        finally:
            task.cancel()
        self._failing = False
        return reading

    def _failed(self, reason: str, text: str) -> None:
        self.at("poll_failures_total", next(iter(self._client.engine_core.engine_ranks_managed)), reason).inc()
        if not self._failing:
            _log.warning("vllm-suite: %s cannot be read: %s", self._what, text)
        self._failing = True


@functools.cache
def _made(specs: tuple[SeriesSpec, ...]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for spec in specs:
        labels = ["model_name", "engine", *spec.labels]
        made[spec.name] = (
            Gauge(spec.name, spec.help, labels, multiprocess_mode="mostrecent")
            if spec.kind == "gauge"
            else Counter(spec.name, spec.help, labels)
        )
    return made
