"""What the live page is given: the state, its bounds, its keys, and the page's own files."""

from __future__ import annotations

from collections import deque
from hashlib import sha256
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from vllm_suite.compat.pull_totals import MAX_PEERS, totals
from vllm_suite.fleet.slo import SloSpec
from vllm_suite.router.members import Member, Pool, Pulled, State
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.ui import document as doc
from vllm_suite.router.ui.history import SPAN_S, STEP_S
from vllm_suite.router.ui.history import Histogram as Shape
from vllm_suite.router.ui.pulls import PullRates
from vllm_suite.router.ui.state import LiveState

LONG = {"model": "tiny", "prompt": list(range(100)), "max_tokens": 5, "stream": True}
PROMISED = {"rate": 3.0, "error": 0.5, "source": "test", "ttft": {"p50": "1m", "p99": "2m", "p99_high": "3m"}}


async def read(router, **kwargs) -> doc.Live:
    status, body = await router.get("/ui/state", **kwargs)
    assert status == 200
    return msgspec.convert(body, doc.Live)


async def test_the_state_is_what_the_router_has(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    d.load = {"running": 3, "waiting": 1, "kv_usage": 0.25}
    d.says = {"pulled": {"kv": {p.instance_id: [5000, 2]}}, "role_epoch": 2}
    p.script = deque(["ok", "500"])
    gone = SimpleNamespace(url="http://127.0.0.1:9", role="prefill")
    router = await serve([p, d, gone], ready=False, slo={"ttft": "5m", "tpot": "10ms"}, predicted=PROMISED)
    await router.until(lambda: sum(m.ready for m in router.router.pool.members) == 2)
    for rid, first in (("one", 0), ("two", 500)):
        prompt = list(range(first, first + 100))
        status, _ = await router.post({**LONG, "prompt": prompt}, headers={"X-Request-Id": rid})
        assert status == 200
    state = await read(router)
    assert [(pool.role, pool.ready, pool.instances, pool.missing) for pool in state.pools] == [
        ("prefill", 1, 1, 1),
        ("decode", 1, 1, 0),
    ]
    (row,) = state.pools[1].members
    assert (row.instance, row.epoch, row.running, row.waiting, row.kv_usage) == (d.instance_id, "e1", 3, 1, 0.25)
    assert (row.role_epoch, row.phase, row.ready, row.why_not) == (2, "serving", True, "")
    assert (state.health, state.headline) == ("degraded", "1 of 2 prefill not ready")
    assert state.traffic.requests_per_s * state.window_s == pytest.approx(2)
    assert (state.traffic.disaggregated, state.traffic.recoveries, state.traffic.failed) == (1.0, 1, 0)
    stages = {stage.name: stage.count for stage in state.latency.stages}
    assert stages["prefill"] >= 1
    assert {one.name: one.count for one in state.latency.seen}["request"] == 2
    assert next((one.name, one.limit, one.attained) for one in state.targets) == ("ttft", 300_000.0, 1.0)
    assert state.plan is not None
    assert [(row.name, row.low, row.high, row.verdict) for row in state.plan.rows] == [
        ("ttft p50", 30_000.0, 90_000.0, "quicker"),
        ("ttft p99", 60_000.0, 180_000.0, "quicker"),
    ]
    (pair,) = state.transfers.pairs
    assert (pair.source, pair.target, pair.bytes_total, pair.pulls_total) == (p.instance_id, d.instance_id, 5000, 2)
    event = next(event for event in state.events if event.kind == "recovery")
    assert (event.what, event.instance) == ("decode_alone", p.instance_id)
    assert event.request == sha256(b"two").hexdigest()[:12]
    # Neither addresses nor ids of requests are in it.
    _, raw = await router.get("/ui/state")
    assert not any(word in str(raw) for word in ("127.0.0.1", "'two'", p.url))


async def test_a_wanted_switch_is_no_trouble_and_one_that_goes_back_is(instance, serve):
    p, d, other = await instance("prefill"), await instance("decode"), await instance("decode")
    router = await serve([p, d, other])
    other.ready, other.says = False, {"phase": "closing", "target": "prefill"}
    await router.until(lambda: any(m.state.phase == "closing" for m in router.router.pool.members))
    state = await read(router)
    assert (state.health, state.headline) == ("ok", f"{other.instance_id} changes from decode to prefill")
    other.says = {"phase": "restoring", "target": "prefill"}
    await router.until(lambda: any(m.state.phase == "restoring" for m in router.router.pool.members))
    router.router.ui._cached = None
    state = await read(router)
    assert (state.health, state.headline) == ("degraded", "1 of 2 decode not ready")


async def test_what_is_wrong_comes_first(instance, serve):
    d = await instance("decode")
    router = await serve([d])
    assert (await read(router)).headline == "1 instance ready"
    router.router.pool.members[0].suspect = True
    d.ready = False
    router.router.ui._cached = None
    state = await read(router)
    assert (state.health, state.pools[0].members[0].why_not) == ("down", "lost a connection")
    await router.until(lambda: not router.router.pool.members[0].suspect)
    router.router.ui._cached = None
    assert (await read(router)).pools[0].members[0].why_not == "not ready"
    router.router.begin_drain()
    router.router.ui._cached = None
    assert (await read(router)).headline.startswith("Draining")


@pytest.mark.parametrize(
    ("auth", "opens", "page"),
    [
        ({}, {None, "api", "control"}, "open"),
        ({"api_keys": ["api"]}, {"api"}, "required"),
        ({"api_keys": ["api"], "control_key": "control"}, {"api", "control"}, "required"),
        ({"control_key": "control"}, {"control"}, "required"),
    ],
)
async def test_keys(instance, serve, auth, opens, page):
    router = await serve([await instance("any")], auth=auth)
    for key in (None, "api", "control"):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        status, body = await router.get("/ui/state", headers=headers)
        assert status == (200 if key in opens else 401), key
        assert status == 200 or set(body) == {"error"}
    status, shell = await router.get("/ui")
    assert status == 200
    assert f'data-key="{page}"'.encode() in shell
    assert router.router.pool.members[0].instance_id.encode() not in shell


async def test_the_page_is_locked_to_its_own_files(instance, serve):
    router = await serve([await instance("any")], auth={"api_keys": ["k"]})
    for path in ("/ui", "/ui/app.js", "/ui/dom.js", "/ui/panels.js", "/ui/path.js", "/ui/style.css", "/ui/icon.svg"):
        async with router.client.get(router.url + path) as response:
            policy = response.headers["Content-Security-Policy"]
            body = await response.text()
            assert response.status == 200
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert not any(
                word in body.replace("http://www.w3.org/", "") for word in ("http://", "https://", "innerHTML =")
            )
            tag = response.headers["ETag"]
        async with router.client.get(router.url + path, headers={"If-None-Match": tag}) as response:
            assert response.status == 304
    status, _ = await router.get("/ui/../app.py")
    assert status == 401
    status, _ = await router.post(b"{}", "/ui/state", headers={"Authorization": "Bearer k"})
    assert status == 405


def state(clock, members: int = 0, **slo) -> tuple[LiveState, RouterMetrics]:
    pool, live = Pool(), Live(0, 4.0)
    for index in range(members):
        name = f"d-{index}-" + "x" * 300
        pulled = tuple(Pulled("kv", "y" * 300 + str(peer), 1e12, 1e6) for peer in range(16))
        said = State(name, "e" * 300, "decode", True, (), phase="p" * 300, pulled=pulled, load={"running": 10**6})
        pool.admit(Member("http://x", said, "decode", 1))
    metrics = RouterMetrics(pool, live)
    return LiveState(pool, live, metrics, SloSpec(**slo), None, clock=clock, wall=clock), metrics


def test_figures_are_of_the_window_alone():
    now = [0.0]
    live, metrics = state(lambda: now[0])

    def minute(seconds: float, requests: int) -> None:
        for _ in range(12):
            for _ in range(requests):
                metrics.count("requests", "chat", "200")
                metrics.observe(seconds, "stage_seconds", "disaggregated", "prefill")
            now[0] += STEP_S
            live.tick()

    minute(0.02, 10)
    first = live.document()
    assert first.traffic.requests_per_s == pytest.approx(2)
    assert {one.name: one.p99 for one in first.latency.stages}["prefill"] == pytest.approx(24.85, abs=0.01)
    for _ in range(round(SPAN_S / 60)):
        minute(2.0, 5)
    later = live.document()
    assert later.window_s == pytest.approx(SPAN_S)
    assert later.traffic.requests_per_s == pytest.approx(1)
    prefill = next(one for one in later.latency.stages if one.name == "prefill")
    assert prefill.p50 is not None
    assert prefill.p50 > 1000
    assert prefill.count == 300
    assert later.traffic.rate_series == [1.0] * 60
    now[0] += 1000
    assert live.document().traffic.in_flight == 0


def test_an_answer_is_bounded_and_shared():
    now = [0.0]
    live, metrics = state(lambda: now[0], members=400)
    for index in range(1000):
        metrics.recovered("decode_retry", "connect", "z" * 300 + str(index), "r" * 500)
    live.tick()
    now[0] += 5
    answer = live.document()
    assert live.document() is answer
    raw = msgspec.json.encode(answer)
    assert len(raw) < 512_000
    assert (len(answer.pools[0].members), answer.pools[0].left_out) == (doc.MAX_MEMBERS, 400 - doc.MAX_MEMBERS)
    assert (len(answer.transfers.pairs), answer.transfers.left_out) == (doc.MAX_PAIRS, 400 * 16 - doc.MAX_PAIRS)
    assert len(answer.events) == doc.MAX_EVENTS


def test_pulls_become_rates():
    now, pool = [0.0], Pool()

    def say(epoch: str, size: float, pulls: float) -> None:
        for member in pool.members:
            pool.forget(member)
        pulled = (Pulled("kv", "p-0", size, pulls), Pulled("ec", "e-0", size / 10, None))
        pool.admit(Member("http://x", State("d-0", epoch, "decode", True, (), pulled=pulled), "decode", 1))

    rates = PullRates(pool, lambda: now[0])
    say("one", 1000, 1)
    assert rates.transfers().kv_bytes_per_s is None
    rates.tick()
    now[0] += 10
    say("one", 6000, 3)
    found = rates.transfers()
    assert (found.kv_bytes_per_s, found.kv_pulls_per_s, found.ec_bytes_per_s) == (500.0, 0.2, 50.0)
    # After a restart it counts from 0: no rate is negative, and nothing is counted twice.
    say("two", 1000, 1)
    assert rates.transfers().kv_bytes_per_s == 100.0


def test_an_instance_tells_what_it_pulled():
    registry = CollectorRegistry()
    size = Counter("vllm_suite_kv_pull_bytes_total", "h", ("engine", "peer", "direction"), registry=registry)
    seconds = Histogram("vllm_suite_kv_pull_seconds", "h", ("engine", "peer", "direction"), registry=registry)
    items = Counter("vllm_suite_ec_fetch_bytes_total", "h", ("engine", "peer"), registry=registry)
    for engine in ("0", "1"):
        size.labels(engine, "p-0", "in").inc(100)
        seconds.labels(engine, "p-0", "in").observe(1)
    size.labels("0", "d-9", "out").inc(999)
    items.labels("0", "e-0").inc(7)
    assert totals(registry) == {"kv": {"p-0": [200.0, 2.0]}, "ec": {"e-0": [7.0, None]}}
    for peer in range(2 * MAX_PEERS):
        size.labels("0", f"q-{peer}", "in").inc(1000 + peer)
    kept = totals(registry)["kv"]
    assert len(kept) == MAX_PEERS
    assert f"q-{2 * MAX_PEERS - 1}" in kept
    assert "q-0" not in kept


@given(st.lists(st.floats(0.001, 200), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_lie_in_the_bucket_of_the_value(values: list[float], share: float) -> None:
    bounds = (0.01, 0.1, 1.0, 10.0, 100.0, float("inf"))
    shape = Shape(bounds, tuple(float(sum(value <= bound for value in values)) for bound in bounds))
    found = shape.quantile(share)
    assert found is not None
    exact = sorted(values)[max(0, -int(-share * len(values) // 1) - 1)]
    upper = next(bound for bound in bounds if exact <= bound)
    lower = max([bound for bound in bounds if bound < upper], default=0.0)
    assert lower <= found <= min(upper, 100.0)
    below = shape.share_below(found)
    assert below is not None
    if upper <= 100:
        assert below == pytest.approx(share, abs=1 / len(values) + 1e-9) or lower == 0.0
