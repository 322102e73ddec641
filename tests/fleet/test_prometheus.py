"""A real Prometheus and a running fleet: exports are in the table, dashboards find data, alerts fire in faults."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import prometheus
from harness import ENGINE_KEY, KEY, Fleet, prompt, request, run_of_ports
from prometheus_client.parser import text_string_to_metric_families

from vllm_suite.fleet.files import load_fleet
from vllm_suite.metrics import GROUPS
from vllm_suite.observability.dashboards import DASHBOARDS
from vllm_suite.observability.rules import rule_file
from vllm_suite.planner.watch import Prometheus as Watched
from vllm_suite.planner.watch import Window

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
SPECS = {spec.name: (group, spec) for group in GROUPS for spec in group.specs}

# Dashboards of other fleets, and where they are held to have data.
ELSEWHERE = {
    "epd": "tests/fleet/test_epd_fleet_faults.py",
    "swiftkv": "tests/engine/test_swiftkv_serving.py",
    "dler": "tests/engine/test_dler_serving.py",
}
# Series by dashboard that this fleet has none of.
NOT_SEEN = {
    "disagg": {"vllm_suite_kv_contained_faults_total": "no transfer failed in a way that would have ended an engine"},
    "roles": {
        "vllm_suite_roles_moves_total": "there is no pool `any`; test_roles_flip.py has one",
        "vllm_suite_role_switches_total": "the same",
        "vllm_suite_role_phase_seconds": "the same",
    },
    "planner": {"vllm_suite_watch_": "no watch runs; in test_planner_watch_real.py one does"},
}


@asynccontextmanager
async def controller(fleet: Fleet) -> AsyncIterator[int]:
    """`vllm-suite roles control`, which only looks here; yields the port of its metrics."""
    port = run_of_ports(1)
    command = [sys.executable, "-m", "vllm_suite.cli.main", "roles", "control", "--dry-run"]
    command += [str(fleet.log_dir.parent / "fleet.yaml"), "--metrics-port", str(port), "--log-dir", str(fleet.log_dir)]
    log = fleet.log_dir / "controller.log"
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(*command, stdout=file, stderr=file)
    try:
        deadline = asyncio.get_running_loop().time() + 60
        while "vllm_suite_roles_looks_total{" not in await text_of(fleet, f"http://127.0.0.1:{port}"):
            assert process.returncode is None, log.read_text()
            assert asyncio.get_running_loop().time() < deadline, log.read_text()
            await asyncio.sleep(0.2)
        yield port
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 30)


async def text_of(fleet: Fleet, url: str, key: str = "") -> str:
    import aiohttp

    try:
        async with fleet.session.get(url + "/metrics", headers={"Authorization": f"Bearer {key}"}) as answer:
            return await answer.text() if answer.status == 200 else ""
    except aiohttp.ClientError:
        return ""


def jobs(fleet: Fleet, controller_port: int) -> list[dict[str, Any]]:
    return [
        prometheus.job("prefill", fleet.url("prefill")),
        prometheus.job("decode", fleet.url("decode")),
        prometheus.job("router", fleet.url("router"), honor_labels=True, authorization={"credentials": KEY}),
        prometheus.job("controller", f"127.0.0.1:{controller_port}"),
    ]


async def some_requests(fleet: Fleet, seed: int) -> None:
    for index, tokens in enumerate((20, 200)):
        assert (await fleet.post(request(prompt(tokens, seed + index), 4))).status == 200
        assert (await fleet.post(request(prompt(tokens, seed + 10 + index), 4, stream=True))).status == 200


def shortened(rules: dict[str, Any]) -> dict[str, Any]:
    """The same expressions, firing as soon as they hold: how long they have to is promtool's to test."""
    text = json.dumps(rules)
    return dict(json.loads(re.sub(r'"for": "\d+m"', '"for": "1s"', text)))


async def test_what_is_exported_is_in_the_table(fleet: Fleet) -> None:
    await some_requests(fleet, 9100)
    async with controller(fleet) as port:
        texts = {
            "router": await text_of(fleet, fleet.url("router"), KEY),
            "prefill": await text_of(fleet, fleet.url("prefill"), ENGINE_KEY),
            "decode": await text_of(fleet, fleet.url("decode"), ENGINE_KEY),
            "controller": await text_of(fleet, f"http://127.0.0.1:{port}"),
        }
    seen = set()
    for where, text in texts.items():
        families = [one for one in text_string_to_metric_families(text) if one.name.startswith("vllm_suite_")]
        assert families, where
        for family in families:
            name = family.name + "_total" * (family.type == "counter")
            if name.endswith("_created"):
                continue  # the client library's own, of counters and histograms
            assert name in SPECS, f"{where} exports {name}, which is not in vllm_suite.metrics"
            group, spec = SPECS[name]
            assert family.type == spec.kind, name
            seen.add(name)
            for sample in family.samples:
                if sample.name.endswith("_created"):
                    continue
                own = {key: value for key, value in sample.labels.items() if key != "le"}
                assert set(own) == {*group.common, *spec.labels}, (name, own)
                for label in spec.labels:
                    assert not label.values or own[label] in label.values, (name, label, own[label])
        ours = "\n".join(line for line in text.splitlines() if re.match(r"(# (HELP|TYPE) )?vllm_suite_", line))
        said = prometheus.promtool("check", "metrics", stdin=ours + "\n")
        assert not said.strip(), (where, said)
    # The whole router table is there from the start, and what its instances count of a hand-over.
    assert {name for name, (group, _) in SPECS.items() if group.title == "Router"} <= seen
    assert {name for name, (group, _) in SPECS.items() if group.title == "Prefill and decode"} <= seen


async def test_dashboards_find_data_and_alerts_fire(fleet: Fleet, tmp_path: Path) -> None:
    """One Prometheus, healthy and then with a prefill instance that hangs and references that are refused."""
    prometheus.program("prometheus")
    spec = load_fleet(fleet.log_dir.parent / "fleet.yaml")
    rules = shortened(rule_file(spec))
    async with controller(fleet) as port:
        with prometheus.running(tmp_path, run_of_ports(1), jobs(fleet, port), rules) as server:
            server.until(server.targets_up, "a good scrape of every target")
            began = time.time()
            await some_requests(fleet, 9200)
            await asyncio.sleep(1.5)  # the first point of what appeared now, before it grows
            await some_requests(fleet, 9300)
            # No request keeps the target of this fleet, nor what its plan promised.
            server.until(lambda: {"VllmSuiteSloBurn", "VllmSuitePredictionLeft"} <= server.firing(), "SLO alerts")
            assert not server.firing() & {"VllmSuitePoolBelowFloor", "VllmSuiteReferencesRefused"}
            # Another request's reference is refused; one whose producer hangs cannot be claimed in time.
            text = prompt(400, 9400)
            wrong = (await fleet.post(request(prompt(400, 9401), 1, kv_transfer_params=PREFILL), "prefill")).json
            right = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json
            assert (
                await fleet.post(request(text, kv_transfer_params=wrong["kv_transfer_params"]), "decode")
            ).status == 200
            server.until(lambda: "VllmSuiteReferencesRefused" in server.firing(), "VllmSuiteReferencesRefused")
            alone = 'sum(vllm_suite_router_recoveries_total{step="decode_alone"})'
            before = server.number(alone)
            fleet.freeze("prefill")
            try:
                late = request(text, kv_transfer_params=right["kv_transfer_params"])
                # One that decode gets by itself, and one through the router, which still lists the instance.
                answers = await asyncio.gather(
                    fleet.post(late, "decode", timeout_s=30), fleet.post(request(prompt(300, 9500), 4), timeout_s=30)
                )
                assert [answer.status for answer in answers] == [200, 200]
                faults = {"VllmSuiteTransferDeadlineMissed", "VllmSuitePoolBelowFloor"}
                server.until(lambda: faults <= server.firing(), f"{faults}")
                server.until(lambda: server.number(alone) > before, "the request that decode computed alone")
            finally:
                fleet.thaw("prefill")
            await fleet.ready("prefill")
            await some_requests(fleet, 9600)
            refused = await fleet.post(request(text), Authorization="Bearer not-the-key")
            assert refused.status == 401
            server.until(lambda: "VllmSuitePoolBelowFloor" not in server.firing(), "the end of VllmSuitePoolBelowFloor")
            for dashboard in DASHBOARDS:
                if dashboard.name not in ELSEWHERE:
                    server.until_filled(dashboard, NOT_SEEN.get(dashboard.name, ()))
            # What the file promised stands beside what was measured.
            promised = server.query("max by (share, bound) (vllm_suite_router_predicted_ttft_seconds)")
            rows = {(row["metric"]["share"], row["metric"]["bound"]): float(row["value"][1]) for row in promised}
            assert rows == {("0.5", "middle"): 1e-6, ("0.99", "middle"): 2e-6, ("0.99", "high"): 3e-6}
            await asyncio.to_thread(watched, server.url, began)
            health = [rule for group in server.api("rules")["groups"] for rule in group["rules"]]
            assert all(rule["health"] == "ok" for rule in health), health


def watched(url: str, began: float) -> None:
    """What `plan --watch` reads there: lengths within those that were asked for."""
    windows = Watched(url, 'job="decode"', step=5.0, lag=1.0).windows(began, time.time())
    busy = [window for window in windows if window.prompts.count]
    assert busy
    whole = Window.joined(busy)
    assert whole.requests > 0
    assert 20 <= whole.prompts.mean <= 400
    assert 1 <= whole.outputs.mean <= 8
