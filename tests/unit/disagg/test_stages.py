"""What an instance says of its part of a request's time, and what it exports before anything has happened."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from vllm_disagg.stages import Stages
from vllm_disagg.stats import SuiteKVStats, SuitePromMetrics
from vllm_suite.metrics import KV
from vllm_suite.metrics.connectors import DEADLINES


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_request_is_timed_once_per_stage() -> None:
    stats, clock = SuiteKVStats(), Clock()
    stages = Stages(lambda: stats, clock)
    stages.arrived("a")
    clock.now += 0.5
    stages.begun("a")
    clock.now += 0.25
    stages.begun("a")  # scheduled again after a preemption
    clock.now += 0.25
    assert stages.done("a", "prefill") == {"queue_s": 0.5, "prefill_s": 0.5}
    assert stages.done("a", "prefill") is None
    stages.arrived("b")
    stages.forget("b")
    stages.begun("b")
    assert stages.done("b", "transfer") is None
    assert stats.data["suite_stages"] == [["queue", 0.5], ["prefill", 0.5]]
    assert stats.clone_and_reset().data["suite_stages"]
    assert stats.is_empty()


@pytest.fixture
def exported() -> Iterator[SuitePromMetrics]:
    kinds = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_role="kv_both"))
    made = SuitePromMetrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"]})
    yield made
    for series in made.series._series.values():
        REGISTRY.unregister(series)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": "0", **labels})


def test_what_alerts_ask_for_is_there_before_its_first_count(exported: SuitePromMetrics) -> None:
    # Prometheus sees no increase of a counter that appears with its first count.
    for spec in KV:
        if spec.kind == "counter" and all(label.values for label in spec.labels):
            for label in spec.labels:
                for one in label.values:
                    assert value(spec.name, **{label: one}) == 0.0
    for reason in DEADLINES:
        assert value("vllm_suite_kv_recomputes_total", reason=reason) == 0.0
    stats = SuiteKVStats()
    stats.staged("transfer", 0.02)
    stats.refused("stale_epoch", recomputed=True)
    exported.observe(stats.data)
    assert value("vllm_suite_kv_stage_seconds_count", stage="transfer") == 1.0
    assert value("vllm_suite_kv_stage_seconds_count", stage="queue") == 0.0
    assert value("vllm_suite_kv_refused_total", reason="stale_epoch") == 1.0
