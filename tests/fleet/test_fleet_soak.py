"""The soak, in short: load and drawn faults at once, every answer compared; `benchmarks/soak.py` is the long one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import CONTROL_KEY, ENGINE_KEY, KEY, Fleet

from vllm_suite.fleet.keys import FleetKeys

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def assert_well(report: dict[str, Any]) -> None:
    failed = {name for name, held in report["checks"].items() if not held}
    shown = ("failures", "held_at_end", "events", "router_exceptions", "errors")
    assert not failed, json.dumps({"failed": sorted(failed), **{name: report[name] for name in shown}}, indent=1)[:8000]


async def test_a_short_soak(fleet: Fleet) -> None:
    """Prefill is killed and stopped, decode stopped, while clients ask, leave and send nonsense."""
    from soak import Plan, soak
    from soak_fleet import View, answered
    from soak_load import questions

    plan = Plan(seconds=14, seed=SEED, clients=3, gap_s=(2.0, 5.0))
    view = View(fleet.log_dir, FleetKeys(KEY, ENGINE_KEY, CONTROL_KEY), fleet.process.pid)
    known = await answered(fleet.url("decode"), ENGINE_KEY, questions(SEED, 12, longest=600, most_tokens=60))
    report = await soak(view, known, plan)
    assert_well(report)
    kinds = {(event["kind"], event["result"]) for event in report["events"]}
    assert kinds >= {("kill", "back"), ("freeze", "went on")}
    right = sum(row.get("right", 0) for row in report["outcomes"].values())
    assert right > report["requests"] / 2


SEED = 20  # kills prefill and stops decode


@pytest.mark.slow
@pytest.mark.timeout(1500)
async def test_a_longer_soak_with_roles(tmp_path: Path) -> None:
    """Three minutes, one instance that changes its role, and the answers of an engine without the suite."""
    from soak import Plan, soak
    from soak_bench import Bench
    from soak_fleet import answers_of_one_engine, fleet_file, running, tiny_model
    from soak_load import questions

    from vllm_suite.fleet.keeper import adopt_orphans

    adopt_orphans()
    model = tiny_model(tmp_path)
    file = fleet_file(tmp_path, model, {"prefill": 1, "decode": 1, "any": 1})
    known = await answers_of_one_engine(tmp_path, file, questions(2, 32))
    async with running(tmp_path, file) as view:
        report = await soak(view, known, Plan(seconds=180, seed=2), Bench(tmp_path, model, 2))
    assert_well(report)
    assert report["bench_serve"]["figures"]["completed"] > 0
    assert any(event["kind"] == "switch" and event["result"] == "switched" for event in report["events"])
