"""The series made of the workers' counters: baseline, growth, restarts, and an engine that answers late, wrongly or
never again. Real engines are read in tests/engine/test_swiftkv_serving.py."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_suite.metrics import SWIFTKV
from vllm_swiftkv.counters import Counters
from vllm_swiftkv.exporter import SwiftKVExporter
from vllm_swiftkv.options import EXTENSION
from vllm_swiftkv.worker import SwiftKVWorkerExtension

_models = itertools.count()
Answer = Callable[[], Awaitable[Any]]


class Client:
    """What the exporter uses of vLLM's engine client; ``answers`` are given one after the other, then it is dead."""

    def __init__(
        self,
        *answers: Any,
        engines: tuple[int, ...] = (0,),
        armed: bool = True,
        rank: int = 0,
        extension: str = EXTENSION,
        architecture: str = "LlamaSwiftKVForCausalLM",
    ) -> None:
        self.answers, self.asked, self.errored = list(answers), 0, False
        self.model = f"m{next(_models)}"
        self.vllm_config = SimpleNamespace(
            additional_config={},
            model_config=SimpleNamespace(served_model_name=self.model, architectures=[architecture]),
            parallel_config=SimpleNamespace(_api_process_rank=rank, worker_extension_cls=extension),
            cache_config=SimpleNamespace(kv_sharing_fast_prefill=armed),
        )
        self.engine_core = SimpleNamespace(engine_ranks_managed=list(engines), call_utility_all_async=self._all)

    async def collective_rpc(self, method: str) -> Any:
        assert method == "swiftkv_counters"
        assert len(self.engine_core.engine_ranks_managed) == 1
        return await self._next()

    async def _all(self, call: str, *arguments: Any) -> Any:
        assert (call, arguments) == ("collective_rpc", ("swiftkv_counters", None, (), None))
        return await self._next()

    async def _next(self) -> Any:
        self.asked += 1
        if not self.answers:
            raise EngineDeadError
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return await answer() if callable(answer) else answer

    def value(self, name: str, engine: int = 0, **labels: str) -> float | None:
        labels |= {"model_name": self.model, "engine": str(engine)}
        return REGISTRY.get_sample_value(f"vllm_suite_swiftkv_{name}", labels)


def counted(steps: int, head: int, prompt: int, tail: int) -> dict[str, int]:
    return {"steps": steps, "head_tokens": head, "prompt_tokens": prompt, "tail_rows": tail}


async def run(client: Client, deadline_s: float = 5.0) -> None:
    await asyncio.wait_for(SwiftKVExporter(client, period_s=0.0, deadline_s=deadline_s).run(), 20)


async def test_the_first_reading_is_where_counting_starts() -> None:
    client = Client([counted(5, 900, 800, 700)], [counted(6, 1000, 890, 710)], [counted(7, 1003, 890, 713)])
    await run(client)
    assert [client.value(f"{n}_total") for n in ("steps", "head_tokens", "prompt_tokens", "tail_rows")] == [
        2,
        103,
        90,
        13,
    ]
    assert client.value("skipped_tokens_total") == 90
    assert client.value("skip_ratio") == pytest.approx(90 / 103)
    assert client.value("armed") == 1


async def test_workers_of_one_engine_are_not_added_up_and_engines_are_apart() -> None:
    zero, tp = counted(0, 0, 0, 0), counted(1, 10, 9, 2)
    client = Client([[zero, zero], [zero, zero]], [[tp, tp], [zero, counted(2, 30, 28, 3)]], engines=(0, 3))
    await run(client)
    assert (client.value("head_tokens_total", 0), client.value("head_tokens_total", 3)) == (10, 30)
    assert (client.value("skipped_tokens_total", 0), client.value("skipped_tokens_total", 3)) == (8, 27)


async def test_a_worker_that_was_started_again_counts_from_zero() -> None:
    client = Client([counted(5, 50, 50, 5)], [counted(6, 60, 60, 6)], [counted(1, 7, 7, 1)])
    await run(client)
    assert (client.value("head_tokens_total"), client.value("steps_total")) == (17, 2)


async def test_failures_are_counted_and_said_once_per_streak(caplog: pytest.LogCaptureFixture) -> None:
    good = [counted(1, 1, 1, 1)]
    broken = Exception("Call to collective_rpc method failed: 'Worker' object has no attribute")
    client = Client(good, broken, broken, good, [{"unknown": 1}], [counted(2, 4, 4, 2)])
    with caplog.at_level(logging.WARNING, "vllm.suite"):
        await run(client)
    assert client.value("poll_failures_total", reason="error") == 3
    assert [r.message.split(": ")[2] for r in caplog.records] == ["the workers' counters cannot be read"] * 2
    assert client.value("head_tokens_total") == 3


async def test_a_busy_engine_is_asked_once_and_its_late_answer_counts() -> None:
    async def late() -> Any:
        await asyncio.sleep(0.25)
        return [counted(3, 30, 30, 3)]

    client = Client([counted(0, 0, 0, 0)], late)
    await run(client, deadline_s=0.1)
    assert client.asked == 3  # the third finds the engine dead
    assert client.value("poll_failures_total", reason="timeout") == 2
    assert client.value("head_tokens_total") == 30


async def test_it_stops_where_a_silent_engine_is_known_to_be_dead() -> None:
    client = Client(asyncio.Event().wait)
    client.errored = True
    await run(client, deadline_s=0.05)
    assert client.asked == 1


@pytest.mark.parametrize(
    ("options", "armed"),
    [
        ({"armed": False}, 0),
        ({"rank": 1}, None),
        ({"architecture": "LlamaForCausalLM"}, None),
        ({"extension": "no.such.Extension"}, 1),
        ({"extension": "collections.Counter"}, 1),
        ({"extension": ""}, 1),
    ],
)
async def test_who_does_not_poll(options: dict[str, Any], armed: int | None) -> None:
    client = Client([counted(0, 0, 0, 0)], **options)
    await run(client)
    assert client.asked == 0
    assert client.value("armed") == armed


class Mine(SwiftKVWorkerExtension):
    """A worker extension of the user's own."""


async def test_an_extension_that_derives_from_ours_is_read(caplog: pytest.LogCaptureFixture) -> None:
    client = Client([counted(0, 0, 0, 0)], [counted(1, 2, 2, 1)], extension=f"{__name__}.Mine")
    await run(client)
    assert client.value("head_tokens_total") == 2
    assert not caplog.records


def test_counters_and_the_table_of_series() -> None:
    counters = Counters()
    counters.step(10, 8, 3)
    counters.step(1, 0, 1)
    assert counters.snapshot() == counted(2, 11, 8, 4)
    assert all(spec.name.startswith("vllm_suite_swiftkv_") for spec in SWIFTKV)
    assert all(spec.name.endswith("_total") == (spec.kind == "counter") for spec in SWIFTKV)
