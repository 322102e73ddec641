"""`vllm-suite status` against a scripted router and instance."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from rich.console import Console

from vllm_suite import metrics
from vllm_suite.cli import status as verb
from vllm_suite.fleet import demo_epd_report, report, status
from vllm_suite.fleet.scrape import parse
from vllm_suite.fleet.state_file import STATE_FILE
from vllm_suite.fleet.status import NoFleet, Source, local_router, snapshot, table

METRICS = """# TYPE vllm_suite_kv_pulls_total counter
vllm_suite_kv_pulls_total{outcome="ok"} 7
vllm_suite_kv_pulls_total{outcome="failed"} 0
# TYPE vllm_suite_kv_pull_bytes_total counter
vllm_suite_kv_pull_bytes_total{peer="p",direction="in"} 3000000
# TYPE vllm_suite_kv_recomputes_total counter
vllm_suite_kv_recomputes_total{reason="expired"} 2
"""


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """A router with two members, one of which cannot be scraped; it asks for the key `k`."""

    async def instances(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer k":
            return web.json_response({}, status=401)
        base = f"http://{request.host}"
        common = {"epoch": "e", "ready": True, "load": {"running": 1, "kv_usage": 0.25}, "outstanding_requests": 3}
        rows = [
            {"instance_id": "d", "role": "decode", "url": base, **common},
            {"instance_id": "p", "role": "prefill", "url": "http://127.0.0.1:9", **common, "load": {}},
        ]
        return web.json_response({"draining": False, "instances": rows})

    async def scraped(request: web.Request) -> web.Response:
        return web.Response(text=METRICS)

    app = web.Application()
    app.router.add_get("/suite/v1/instances", instances)
    app.router.add_get("/metrics", scraped)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def state(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / STATE_FILE).write_text(json.dumps({"pid": 1, "processes": rows}))


def shown(view: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(view)
    return out.getvalue().replace("│", " ").replace("┃", " ")


async def look(source: Source) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session:
        return await snapshot(session, source)


async def test_a_snapshot_joins_router_instances_and_processes(url: str, tmp_path: Path) -> None:
    state(
        tmp_path,
        {"name": "d", "role": "decode", "url": url, "state": "ready", "restarts": 2},
        {"name": "gone", "role": "decode", "url": "http://127.0.0.1:8", "state": "restarting", "restarts": 1},
        {"name": "r", "role": "router", "url": url, "state": "ready", "restarts": 0},
    )
    now = await look(Source(url, "k", log_dir=tmp_path))
    assert [row["instance_id"] for row in now["instances"]] == ["d", "gone", "p"]
    decode, gone, prefill = now["instances"]
    assert decode["metrics"]["kv_pulls"] == {"ok": 7}
    assert decode["metrics"]["kv_bytes_in"] == 3_000_000
    assert decode["restarts"] == 2
    assert prefill["metrics"] is None
    assert gone["ready"] is False
    assert now["ok"] is False
    text = shown(table(now))
    assert re.search(r"d +decode +ready, restarts: 2 +1 +25 % +3 +7 +3\.0 MB +0\.0 MB", text)
    assert re.search(r"gone +decode +restarting, restarts: 1", text)


async def test_encoders_get_columns_of_their_own(url: str) -> None:
    now = await look(Source(url, "k"))
    assert "encoded" not in shown(table(now))
    now["instances"][0] |= {"role": "encode"}
    now["instances"][0]["metrics"] |= {
        "ec_encoded": 12.0, "ec_fetches": {"ok": 11.0, "failed": 1.0}, "ec_bytes_in": 5e6,
        "ec_local_encodes": {"expired": 2.0}, "ec_pool_items": 4.0, "ec_pool_bytes": 3e6,
    }  # fmt: skip
    text = shown(table(now))
    assert re.search(r"encoded +fetched +in +encoded locally +kept", text)
    assert re.search(r"12 +11 +5\.0 MB +2 +4: 3\.0 MB", text)


def test_what_an_encoder_counts_is_read() -> None:
    samples = parse('vllm_suite_ec_encoded_items_total 7\nvllm_suite_ec_pool_bytes{tier="device"} 9\n')
    assert status.transfers(samples)["ec_encoded"] == 7
    assert status.transfers(samples)["ec_pool_bytes"] == 9


async def test_rates_come_from_two_snapshots(url: str) -> None:
    now = await look(Source(url, "k"))
    assert now["ok"] is True
    before = json.loads(json.dumps(now))
    before["time"] -= 2
    before["instances"][0]["metrics"]["kv_bytes_in"] = 1_000_000
    assert re.search(r"0\.0 MB +1\.0 ", shown(table(now, before)))
    before["instances"][0]["metrics"]["kv_bytes_in"] = 9_000_000  # it was restarted meanwhile
    assert re.search(r"0\.0 MB +0\.0 ", shown(table(now, before)))


async def test_what_cannot_be_asked_is_said(url: str, tmp_path: Path) -> None:
    with pytest.raises(NoFleet, match="set VLLM_SUITE_CONTROL_KEY"):
        await look(Source(url))
    with pytest.raises(NoFleet, match="gives no answer"):
        await look(Source("http://127.0.0.1:9"))
    with pytest.raises(NoFleet, match="no running fleet in"):
        local_router(tmp_path)
    state(tmp_path, {"name": "r", "role": "router", "url": "u", "state": "stopped"})
    with pytest.raises(NoFleet):
        local_router(tmp_path)
    state(tmp_path, {"name": "r", "role": "router", "url": "u", "state": "ready"})
    assert local_router(tmp_path) == "u"


def test_the_verb_fails_where_there_is_no_fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    assert verb.run(parser.parse_args(["--log-dir", str(tmp_path), "--once"])) == 1
    assert "no running fleet" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--interval", "0"])


def test_the_series_that_are_read_exist() -> None:
    known = {spec.name for spec in (*metrics.KV, *metrics.EC, *metrics.ROUTER)}
    source = "".join(Path(module.__file__).read_text() for module in (status, report, demo_epd_report))
    read = set(re.findall(r'"(vllm_suite_\w+)"', source))
    assert len(read) >= 16
    assert {name.removesuffix("_sum").removesuffix("_count") for name in read} <= known
