"""Counts from workers and scheduler to Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("vllm")

from prometheus_client import REGISTRY, Counter, Gauge, Histogram

from tests.unit.epd.pools import Clock, put
from tests.unit.epd.producers import LocalProducer
from vllm_epd.item_server import ServerCounts
from vllm_epd.pool_stats import PoolStats
from vllm_epd.stats import SuiteECPromMetrics, SuiteECStats, count_pool, count_server
from vllm_epd.worker import SuiteECWorker
from vllm_suite.metrics import EC

LABELS = {"model_name": "m", "engine": "0"}


@pytest.fixture
def metrics() -> Iterator[SuiteECPromMetrics]:
    kinds: dict[Any, Any] = {Gauge: Gauge, Counter: Counter, Histogram: Histogram}
    config = SimpleNamespace(ec_transfer_config=None)
    made = SuiteECPromMetrics(config, kinds, ["model_name", "engine"], {0: ["m", "0"]})
    yield made
    for series in made.series._series.values():
        REGISTRY.unregister(series)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm_suite_ec_{name}", LABELS | labels)


def test_counters_start_at_zero_and_gauges_of_tiers_with_the_tier(metrics: SuiteECPromMetrics) -> None:
    assert value("pool_evictions_total", tier="host") == value("fetches_total", outcome="ok") == 0
    assert value("pool_capacity_bytes", tier="host") is None


def test_counts_add_up_and_gauges_do_not() -> None:
    one, other = SuiteECStats(), SuiteECStats()
    assert one.is_empty()
    one.count("refused", "expired")
    one.gauge("pool_items", 3, "device")
    other.count("refused", "expired", 2)
    other.count("refused", "unknown")
    other.gauge("pool_items", 4, "device")
    other.observe("fetch_seconds", 0.5)
    one.aggregate(other)
    assert one.data["counts"] == {"refused": {"expired": 3, "unknown": 1}}
    assert one.data["gauges"] == {"pool_items": {"device": 4}}
    assert one.data["seconds"] == {"fetch_seconds": [0.5]}
    old = one.clone_and_reset()
    assert one.is_empty()
    assert old.reduce()["Num refused references"] == 4


def test_it_crosses_processes_as_vllm_sends_it(metrics: SuiteECPromMetrics) -> None:
    stats = SuiteECStats()
    stats.count("fetches", "ok", 2)
    stats.count("fetch_bytes", "e", 4096)
    stats.count("loads")
    stats.observe("fetch_seconds", 0.003)
    stats.gauge("pool_bytes", 77, "host")
    data = msgspec.msgpack.decode(msgspec.msgpack.encode(stats.data))
    metrics.observe(SuiteECStats(data).data)
    metrics.observe(data)
    assert value("fetches_total", outcome="ok") == 4
    assert value("fetch_bytes_total", peer="e") == 8192
    assert value("loads_total") == 2
    assert value("fetch_seconds_count") == 2
    assert value("pool_bytes", tier="host") == 77


def test_series_without_labels_are_there_from_the_start(metrics: SuiteECPromMetrics) -> None:
    for spec in EC:
        if spec.kind == "counter" and not spec.labels:
            assert value(spec.name.removeprefix("vllm_suite_ec_")) == 0, spec.name


def test_peers_beyond_the_limit_share_a_label(metrics: SuiteECPromMetrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_suite.engine_series.MAX_PEERS", 2)
    stats = SuiteECStats()
    for peer in ("a", "b", "c", "d", "a"):
        stats.count("fetch_bytes", peer)
    metrics.observe(stats.data)
    assert value("fetch_bytes_total", peer="a") == 2
    assert value("fetch_bytes_total", peer="other") == 2
    assert value("fetch_bytes_total", peer="c") is None


def test_everything_that_pool_and_server_count_is_a_series(metrics: SuiteECPromMetrics) -> None:
    pool = PoolStats(
        hits={"device": 1},
        misses=2,
        evictions={"device": 3},
        demotions={"device": 4},
        not_stored={"non_finite": 5},
        stored_items=6,
        stored_rows=7,
        stored_bytes=8,
        expired_pins=9,
        corrupt=10,
        used_bytes={"device": 11},
        capacity_bytes={"device": 12},
        items={"device": 13},
        pins=14,
        unread=19,
    )
    stats = SuiteECStats()
    count_pool(stats, pool)
    count_server(stats, ServerCounts(1, 15, 16, {"expired": 17}, {"bad_message": 18}))
    metrics.observe(stats.data)
    assert value("pool_hits_total", tier="device") == 1
    assert value("pool_misses_total") == 2
    assert value("pool_evictions_total", tier="device") == 3
    assert value("pool_demotions_total", tier="device") == 4
    assert value("not_stored_total", reason="non_finite") == 5
    assert value("encoded_items_total") == 6
    assert value("encoded_rows_total") == 7
    assert value("contained_faults_total", fault="expired_pin") == 9
    assert value("contained_faults_total", fault="corrupt_item") == 10
    assert value("pool_bytes", tier="device") == 11
    assert value("pool_capacity_bytes", tier="device") == 12
    assert value("pool_items", tier="device") == 13
    assert value("leases_outstanding") == 14 + 19
    assert value("served_total", end="read") == 15
    assert value("served_total", end="given_up") == 16
    assert value("claims_refused_total", reason="expired") == 17
    assert value("contained_faults_total", fault="bad_message") == 18


def test_the_end_of_the_last_lease_is_reported_by_itself() -> None:
    """An encoder without work makes no step and reports what is news alone; its drain waits for the leases."""
    producer, clock = LocalProducer(lease_s=10.0), Clock()
    producer.pool._clock = clock
    worker = SuiteECWorker.__new__(SuiteECWorker)  # what reports, without a model
    worker._counting, worker._stats, worker._reported = threading.Lock(), SuiteECStats(), {}
    worker._pool, worker._server, worker._puller = producer.pool, producer.server, None
    try:
        put(producer.pool, "a"), put(producer.pool, "b")
        first = worker._counters()
        assert first is not None
        assert first.gauges["leases_outstanding"] == {"": 2}
        clock.now += 5.0
        assert worker._counters(news_only=True) is None
        clock.now += 5.0
        over = worker._counters(news_only=True)
        assert over is not None
        assert over.gauges["leases_outstanding"] == {"": 0}
        assert worker._counters(news_only=True) is None
    finally:
        producer.close()
