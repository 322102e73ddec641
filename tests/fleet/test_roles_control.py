"""`roles.control: true`: the controller is a child of `vllm-suite up`, gives roles, follows the load, dies, is back."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from flip import DECODE, PREFILL, Mix, Steady, access, alone, become, flip_spec, switch
from harness import CONTROL_KEY, Fleet, run_of_ports, running

from vllm_suite.roles.client import look

PREFILLING = {"prefill": 2, "decode": 1}
DECODING = {"prefill": 1, "decode": 2}
# The controller stays away for so long that a load goes through without it.
AWAY_S = 6
SHORT = Mix(DECODE.name, DECODE.prompt, 60)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@asynccontextmanager
async def controlled(model: Path, folder: Path, roles: dict[str, Any]) -> AsyncIterator[Fleet]:
    """A fleet whose controller has given `roles.start` to instances that had no role."""
    wanted = flip_spec(model, folder / "logs", {"every": 0.25, "agree": 2, "hold": 1, "least_queue": 3, **roles})
    wanted["roles"] |= {"control": True, "start": PREFILLING}
    wanted["slo"] = {"ttft": "20s", "tpot": "2s"}
    wanted["local"] |= {"controller_port": run_of_ports(1), "restart": {"first_delay": f"{AWAY_S}s"}}
    with running(folder, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, folder / "logs", session)
            await become(fleet, PREFILLING)
            yield fleet


async def moves(fleet: Fleet, **labels: str) -> float:
    return await fleet.metric("controller", "vllm_suite_roles_moves_total", outcome="begun", **labels)


async def test_the_controller_of_up_dies_and_comes_back(model: Path, tmp_path: Path) -> None:
    async with controlled(model, tmp_path, {}) as fleet:
        assert await moves(fleet, why="start") == 3
        expected = await alone(fleet, (PREFILL, SHORT), warm=False)
        async with Steady(fleet, SHORT, 8, expected) as steady:
            await become(fleet, DECODING)
            await steady.some(8)
        assert await moves(fleet, why="rule", source="prefill", target="decode") == 1
        before = fleet.member("controller")
        async with Steady(fleet, PREFILL, 8, expected) as flipped:
            fleet.signal("controller", signal.SIGKILL)
            async with asyncio.timeout(60):
                while fleet.member("controller")["state"] != "restarting":
                    await asyncio.sleep(0.02)
            # Nobody leads: the roles stay as they are, and everything is served.
            await flipped.some(8)
            if fleet.member("controller")["state"] == "restarting":
                await become(fleet, DECODING, timeout_s=10)
            # It is back, knows nothing of before, and follows.
            await become(fleet, PREFILLING)
            await flipped.some(8)
        now = fleet.member("controller")
        assert (now["state"], now["restarts"]) == ("ready", before["restarts"] + 1)
        assert await moves(fleet, why="rule", source="decode", target="prefill") == 1
        assert await moves(fleet, why="start") == 0
    for run in (steady, flipped):
        assert [one for one in run.answers if not one.right] == []


async def test_a_role_that_was_set_by_hand_outlives_a_crash(model: Path, tmp_path: Path) -> None:
    async with controlled(model, tmp_path, {}) as fleet:
        seen, _ = await look(fleet.session, access(fleet))
        name = next(one.instance_id for one in seen if one.role == "prefill").removeprefix("fleet-")
        await switch(fleet, name, "decode")
        async with asyncio.timeout(60):
            while '_instances{role="decode"} 2.0' not in (await fleet.get("controller", "/metrics")).text:
                await asyncio.sleep(0.1)
        fleet.signal(name, signal.SIGKILL)
        async with asyncio.timeout(60):
            while fleet.member(name)["state"] != "restarting":
                await asyncio.sleep(0.02)
        # `start` would make it prefill.
        await become(fleet, DECODING, timeout_s=240)
        assert (await fleet.get(name, "/suite/v1/role", CONTROL_KEY)).json["role"] == "decode"
        assert (await moves(fleet, why="again"), await moves(fleet, why="start")) == (1, 3)
        expected = await alone(fleet, (PREFILL, SHORT), warm=False)
        async with Steady(fleet, SHORT, 2, expected) as steady:
            await steady.some(8)
        assert [one for one in steady.answers if not one.right] == []


@pytest.fixture(scope="module")
def calibration(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """How long the steps of this very engine take on this machine."""
    path = tmp_path_factory.mktemp("calibrated") / "tiny.yaml"
    limits = ["--max-num-seqs", "8", "--max-num-batched-tokens", "2048", "--max-model-len", "2048"]
    engine = json.dumps({"kv_cache_memory_bytes": 128 << 20, "block_size": 32})
    options = ["--dtype", "float32", "--engine-args", engine, "--seconds", "30", "--dense", "0.5"]
    command = [sys.executable, "-m", "vllm_suite.cli.main", "calibrate", "--model", str(model), "-o", str(path)]
    done = subprocess.run([*command, *limits, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


async def test_the_planners_prediction_decides(model: Path, tmp_path: Path, calibration: Path) -> None:
    predict = {"hardware": "3xCPU-2CORE", "source": f"calibrated={calibration}", "window": 5, "horizon": 60}
    async with controlled(model, tmp_path, {"rule": "goodput", "predict": predict}) as fleet:
        expected = await alone(fleet, (PREFILL, DECODE), warm=False)
        figures = {}
        for mix, roles in ((DECODE, DECODING), (PREFILL, PREFILLING)):
            # So many that what waits is more than any fleet of three holds: which roles hold most of it, decides.
            async with Steady(fleet, mix, 48, expected) as steady:
                await become(fleet, roles)
                names = ("demand", "goodput", "goodput_best")
                figures[mix.name] = {
                    name: await fleet.metric("controller", f"vllm_suite_roles_{name}") for name in names
                }
                await steady.some(8)
            assert [one for one in steady.answers if not one.right] == []
        print("goodput", json.dumps(figures))
        assert await moves(fleet, why="rule", source="prefill", target="decode") == 1
        assert await moves(fleet, why="rule", source="decode", target="prefill") == 1
