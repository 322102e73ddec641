"""The ring of recoveries and changes of membership that the live page shows."""

from __future__ import annotations

from collections import deque
from hashlib import sha256

import pytest

from vllm_suite.fleet.launch import plan_instances
from vllm_suite.fleet.launch_front import router_config
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.recent import AGAIN_S, LIMIT, Recent

LONG = {"model": "tiny", "prompt": list(range(100)), "max_tokens": 5}


def test_what_repeats_is_one_row_until_it_pauses() -> None:
    now = [1000.0]
    recent = Recent(lambda: now[0])
    for _ in range(3):
        recent.note("recovery", "decode_retry", "connect", "d-0", "r1")
        now[0] += 1
    recent.note("membership", "suspect", instance="d-0")
    now[0] += AGAIN_S + 1
    recent.note("recovery", "decode_retry", "connect", "d-0", "r2")
    found = [(row.what, row.times, row.began, row.last) for row in recent.rows()]
    assert found == [
        ("decode_retry", 1, 1064.0, 1064.0),
        ("suspect", 1, 1003.0, 1003.0),
        ("decode_retry", 3, 1000.0, 1002.0),
    ]
    assert recent.rows()[0].request == sha256(b"r2").hexdigest()[:12]


def test_it_is_bounded() -> None:
    now = [0.0]
    recent = Recent(lambda: now[0])
    for index in range(5 * LIMIT):
        recent.note("recovery", "decode_retry", "connect", f"d-{index % (2 * LIMIT)}")
        now[0] += 2 * AGAIN_S
    assert len(recent.rows()) == LIMIT
    assert len(recent._rows) + len(recent._closed) <= 2 * LIMIT
    assert recent.rows()[0].last == now[0] - 2 * AGAIN_S


async def test_recoveries_of_the_router_say_which_instance_and_which_request(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    p.script = deque(["500"])
    router = await serve([p, d])
    status, _ = await router.post(LONG, headers={"X-Request-Id": "mine"})
    assert status == 200
    row = router.router.metrics.recent.rows()[0]
    assert (row.kind, row.what, row.why, row.instance) == ("recovery", "decode_alone", "status", p.instance_id)
    assert row.request == sha256(b"mine").hexdigest()[:12]
    assert router.value("recoveries_total", step="decode_alone", reason="status") == 1
    assert {(row.what, row.instance) for row in router.router.metrics.recent.rows()[1:]} == {
        ("admitted", p.instance_id),
        ("admitted", d.instance_id),
    }


async def test_an_answer_that_broke_off_is_named(instance, serve):
    d = await instance("decode")
    d.script = deque(["die"])
    router = await serve([d])
    await router.post({**LONG, "stream": True}, headers={"X-Request-Id": "cut"})
    row = next(row for row in router.router.metrics.recent.rows() if row.kind == "recovery")
    assert (row.what, row.why, row.instance) == ("broken_off", "disconnect", d.instance_id)
    assert row.request == sha256(b"cut").hexdigest()[:12]


def test_the_router_of_a_fleet_gets_its_targets_and_its_plan() -> None:
    import yaml

    data = {"model": "m", "pools": {"any": {}}, "local": {"device": "cpu"}}
    promised = {"rate": 2.0, "error": 0.2, "source": "roofline", "ttft": {"p50": "180ms", "p99": "300ms"}}
    spec = FleetSpec.model_validate({**data, "slo": {"ttft": "300ms"}, "predicted": promised})
    config = RouterConfig.model_validate(yaml.safe_load(router_config(spec, plan_instances(spec))))
    assert config.slo.ttft == 300.0
    assert config.predicted is not None
    assert config.predicted.ttft is not None
    assert config.predicted.ttft.p99 == 300.0
    with pytest.raises(ValueError, match="stand at the top of a fleet file"):
        FleetSpec.model_validate({**data, "router": {"slo": {"ttft": "300ms"}}})
