"""The series made of the scheduler's counters: growth, gauges, and an engine that answers late, wrongly or never again.
A real engine is read in tests/engine/test_dler_serving.py."""

from __future__ import annotations

import asyncio
import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY
from sched_requests import Clock, Known, of, policy
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_dler.exporter import DlerExporter
from vllm_dler.options import OWN_SCHEDULER, SCHEDULER
from vllm_suite.metrics import SCHED

_models = itertools.count()


class Client:
    """What the exporter uses of vLLM's engine client; ``answers`` are given one after the other, then it is dead."""

    def __init__(self, *answers: Any, rank: int = 0, scheduler: str | None = SCHEDULER, suite: Any = None) -> None:
        self.answers, self.asked, self.errored = list(answers), 0, False
        self.model = f"d{next(_models)}"
        self.vllm_config = SimpleNamespace(
            additional_config={"suite": {"dler": suite or {}}},
            model_config=SimpleNamespace(served_model_name=self.model),
            parallel_config=SimpleNamespace(_api_process_rank=rank),
            scheduler_config=SimpleNamespace(scheduler_cls=scheduler),
        )
        self.engine_core = SimpleNamespace(engine_ranks_managed=[0], call_utility_all_async=self._all)

    async def _all(self, method: str) -> Any:
        assert method == "suite_scheduler_report"
        self.asked += 1
        if not self.answers:
            raise EngineDeadError
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [await answer() if callable(answer) else answer]

    def value(self, name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(
            f"vllm_suite_sched_{name}", {"model_name": self.model, "engine": "0", **labels}
        )


def run(client: Client, deadline_s: float = 5.0) -> DlerExporter:
    exporter = DlerExporter(client, period_s=0.0, deadline_s=deadline_s)
    asyncio.run(asyncio.wait_for(exporter.run(), 20))
    return exporter


def reports() -> tuple[Any, Any]:
    """What a policy says after one request and after three."""
    clock = Clock()
    one = policy(lengths=Known({"class:a": 7.0}), clock=clock)
    found = []
    for ends in (1, 2):
        for _ in range(ends):
            ask = of("a", clock.now)
            one.arrived(ask, 0)
            one.begin_step()
            one.admitted([ask.request_id])
            clock.now += 3
            ask.num_output_tokens = 6
            one.begin_step()
            one.finished(ask, "stop")
        found.append(one.report())
    waiting = of("a", clock.now)
    queue = one.queue()
    one.arrived(waiting, 0)
    queue.add_request(waiting)
    clock.now += 10
    return found[0], one.report()


def test_counters_grow_and_gauges_are_set() -> None:
    client = Client(*reports())
    exporter = run(client)
    assert exporter.facts() == {"length_aware": True}
    assert client.value("active") == 1
    assert client.value("kappa") == 0.02
    assert client.value("requests_total", **{"class": "a", "end": "stop"}) == 3
    assert client.value("output_tokens_total", **{"class": "a"}) == 18
    assert client.value("latency_seconds_total", **{"class": "a"}) == 9
    assert client.value("normalised_latency_seconds", **{"class": "a", "share": "0.5"}) == 0.5
    assert client.value("length_error_tokens", share="0.5") == 1
    assert client.value("queue_length", **{"class": "a"}) == 1
    assert client.value("queue_age_seconds", **{"class": "a"}) == 10
    assert client.value("wait_p99_seconds", order="actual") == client.value("wait_p99_seconds", order="in_turn") == 10
    assert client.value("overtakes_total") == 0
    # Nothing of the kind happened, and a rate has a first point.
    assert client.value("boosts_total") == client.value("evictions_total", reason="kv_full") == 0
    assert client.value("poll_failures_total", reason="timeout") == 0


def test_every_series_that_a_policy_reports_is_in_the_table() -> None:
    names = {spec.name.removeprefix("vllm_suite_sched_"): spec for spec in SCHED}
    report = reports()[1]
    for series, rows in report["counters"].items():
        spec = names[f"{series}_total"]
        assert spec.kind == "counter"
        assert all(len(labels) == len(spec.labels) for labels, _ in rows)
    for series, rows in report["gauges"].items():
        assert names[series].kind == "gauge"
        assert all(len(labels) == len(names[series].labels) for labels, _ in rows)


@pytest.mark.parametrize(
    ("client", "active"),
    [
        (Client(scheduler="mine.Scheduler"), 0),
        (Client(scheduler=None), 0),
        (Client(suite={"boost": {"strength": 0}}), 0),
        (Client(scheduler=OWN_SCHEDULER), 1),
    ],
)
def test_what_orders_requests_here(client: Client, active: int) -> None:
    exporter = run(client)
    assert client.value("active") == active
    assert exporter.facts() == {"length_aware": bool(active)}
    # With kappa 0 it still counts; another scheduler is not asked.
    assert client.asked == (client.vllm_config.scheduler_config.scheduler_cls in (SCHEDULER, OWN_SCHEDULER))


def test_of_several_servers_one_reads() -> None:
    client = Client(rank=1)
    run(client)
    assert client.asked == 0
    assert client.value("active") is None


def test_what_cannot_be_read_is_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def late() -> Any:
        await asyncio.sleep(0.2)
        return reports()[0]

    client = Client(RuntimeError("first"), RuntimeError("second"), late)
    with caplog.at_level(logging.WARNING, "vllm.suite"):
        run(client, deadline_s=0.05)
    assert client.value("poll_failures_total", reason="error") == 2
    assert (client.value("poll_failures_total", reason="timeout") or 0) >= 1
    assert client.value("requests_total", **{"class": "a", "end": "stop"}) == 1
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
