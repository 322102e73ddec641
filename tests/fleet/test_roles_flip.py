"""The mix of a load flips, and the roles of real engines follow it: nothing lost, nothing wrong."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import pytest
from flip import DECODE, FIXED, PREFILL, Controlled, alone, arrange, capacity, flip_spec, load, roles_now
from harness import Fleet, running

ROLES = {"every": 0.5, "agree": 2, "hold": 3, "least_queue": 3}


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_roles_follow_a_load_that_flips(model: Path, tmp_path: Path) -> None:
    wanted = flip_spec(model, tmp_path / "logs", ROLES)
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            await arrange(fleet, FIXED)
            expected = await alone(fleet, (PREFILL, DECODE))
            # More than one instance can decode, less than two.
            rate = 1.5 * await capacity(fleet, DECODE, 8)
            async with Controlled(fleet, wanted) as controlled:
                run = await load(fleet, [(PREFILL, 1.0, 10), (DECODE, rate, 60)], expected, 5)
            then = await roles_now(fleet)
    print("moves", json.dumps(controlled.moves), then)
    assert [one.error for one in run.answers if one.error] == []
    assert all(one.right for one in run.answers)
    assert len(run.answers) == 70
    assert ("prefill", "decode") in {(move["source"], move["target"]) for move in controlled.moves}
    # Never fewer than the floor, whatever came after the load.
    assert min(then.values()) >= 1
