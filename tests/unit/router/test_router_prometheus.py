"""A real Prometheus scrapes a router: its series pass promtool, its dashboards find data, alerts on it fire."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from pathlib import Path

import prometheus
import pytest
import yaml
from conftest import StartInstance, StartRouter

from vllm_suite.fleet.files import parse_fleet
from vllm_suite.observability.dashboards import OVERVIEW, PLANNER
from vllm_suite.observability.rules import rule_file

PREDICTED = {
    "rate": 1000.0,
    "error": 0.2,
    "source": "roofline",
    "ttft": {"p50": "0.001ms", "p99": "0.002ms", "p99_high": "0.003ms"},
    "tpot": {"p50": "30s", "p99": "60s"},
}
FLEET = {
    "model": "tiny",
    "pools": {"prefill": {"replicas": 2}, "decode": {}},
    "slo": {"ttft": "0.001ms", "tpot": "60s"},
    "predicted": PREDICTED,
}


def body(seed: int, **fields: object) -> dict[str, object]:
    text = " ".join(str(random.Random(seed).random()) for _ in range(9))
    return {"model": "tiny", "prompt": text, "stream": True, **fields}


@pytest.mark.timeout(120)
async def test_a_router_in_front_of_prometheus(instance: StartInstance, serve: StartRouter, tmp_path: Path) -> None:
    for name in ("prometheus", "promtool"):
        prometheus.program(name)
    prefill, decode = await instance("prefill"), await instance("decode", script=deque(["die", "reset"]))
    router = await serve([prefill, decode], slo=FLEET["slo"], predicted=PREDICTED, auth={"api_keys": ["secret"]})
    headers = {"Authorization": "Bearer secret"}

    async def load(seed: int) -> None:
        for index in range(4):
            await router.post(body(seed + index), headers={**headers, "Connection": "close"})
        await router.post(body(seed))  # without a key

    await load(1)
    _, text = await router.get("/metrics", headers=headers)
    assert not (await asyncio.to_thread(prometheus.promtool, "check", "metrics", stdin=text.decode())).strip()
    rules = rule_file(parse_fleet(yaml.safe_dump(FLEET)))
    for rule in rules["groups"][0]["rules"]:
        if "for" in rule:
            rule["for"] = "1s"  # how long it has to hold is promtool's to test
    job = {
        "job_name": "router",
        "honor_labels": True,
        "authorization": {"credentials": "secret"},
        "static_configs": [{"targets": [router.url.removeprefix("http://")]}],
    }
    found = await asyncio.to_thread(prometheus.free_port)
    with prometheus.running(tmp_path, found, [job], rules) as server:
        await asyncio.to_thread(server.until, server.targets_up, "a good scrape")
        await load(11)
        await asyncio.sleep(1.5)  # the first point of what appeared now, before it grows
        await load(21)
        # The first failure since the start of its kind, and the first request that ends with it, are an increase.
        decode.script.append("500")
        assert (await router.post({**body(31), "stream": False}, headers=headers))[0] == 500
        for name in ('recoveries_total{step="error",reason="status"}', 'requests_total{code="500"}'):
            seen = f"sum(increase(vllm_suite_router_{name}[1m])) > 0"
            await asyncio.to_thread(server.until, lambda seen=seen: bool(server.query(seen)), seen)
        wanted = {"VllmSuiteSloBurn", "VllmSuitePredictionLeft", "VllmSuitePoolBelowFloor"}
        await asyncio.to_thread(server.until, lambda: wanted <= server.firing(), f"{wanted}")
        # The fleet file has two prefill instances, the router one.
        pools = [one for one in await asyncio.to_thread(server.query, "ALERTS{alertname='VllmSuitePoolBelowFloor'}")]
        assert {one["metric"]["role"] for one in pools} == {"prefill"}
        blank = await asyncio.to_thread(server.blank, OVERVIEW)
        # Neither an engine nor a watch runs here.
        blank += await asyncio.to_thread(server.blank, PLANNER, ("vllm:", "vllm_suite_watch_"))
        assert not blank
