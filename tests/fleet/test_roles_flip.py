"""The mix of a load flips and flips back, and the roles of real engines follow it: nothing lost, nothing wrong."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import aiohttp
import prometheus
import pytest
from flip import (
    DECODE,
    FIXED,
    NAMES,
    PREFILL,
    Answer,
    Controlled,
    Mix,
    Slowest,
    Steady,
    alone,
    arrange,
    become,
    capacity,
    flip_spec,
    load,
    roles_now,
    slowest,
)
from harness import KEY, Fleet, run_of_ports, running
from prometheus_client import start_http_server

from vllm_suite.observability.capabilities import ROLES as DASHBOARD

ROLES = {"every": 0.5, "agree": 2, "hold": 3, "least_queue": 3}
# A second of looks that agree: requests that wait for their KV blocks on a busy machine are no queue yet.
QUICK = {"every": 0.25, "agree": 4, "hold": 1, "least_queue": 3}

# More than one instance takes of either mix: two prefills run together there, or four that decode.
CLIENTS = 8
# Answers that have to be inside the target, and how often they may take what the same load took in roles that fit.
COUNT = 16
SLACK = 3.0
SHORT = Mix(DECODE.name, DECODE.prompt, 60)
FLIPS = (
    (PREFILL, {"prefill": 2, "decode": 1}),
    (SHORT, {"prefill": 1, "decode": 2}),
    (PREFILL, {"prefill": 2, "decode": 1}),
)


async def test_roles_follow_a_load_that_flips_and_flips_back(model: Path, tmp_path: Path) -> None:
    wanted = flip_spec(model, tmp_path / "logs", QUICK)
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            await arrange(fleet, FIXED)
            expected = await alone(fleet, (PREFILL, SHORT), warm=False)
            # What each load takes where the roles fit it, by hand.
            fitting: dict[str, Slowest] = {}
            for mix, roles in ((PREFILL, FIXED), (SHORT, {**FIXED, "any-1": "decode"})):
                await arrange(fleet, roles)
                async with Steady(fleet, mix, CLIENTS, expected) as steady:
                    await steady.some(CLIENTS)
                    fitting[mix.name] = slowest(await steady.some(COUNT))
            answers = list[Answer]()
            controlled = Controlled(fleet, wanted)
            series, _ = start_http_server(port := run_of_ports(1), "127.0.0.1", controlled.registry)
            jobs = [
                prometheus.job("instances", *(fleet.url(name) for name in NAMES)),
                prometheus.job("router", fleet.url("router"), honor_labels=True, authorization={"credentials": KEY}),
                prometheus.job("controller", f"127.0.0.1:{port}"),
            ]
            with contextlib.ExitStack() as stack:
                server = None
                if prometheus.available():  # without one the rest of the test is run all the same
                    server = stack.enter_context(prometheus.running(tmp_path, run_of_ports(1), jobs, interval="2s"))
                async with controlled:
                    # The roles are those of the decode-heavy mix now: the first flip is towards prefill.
                    for mix, roles in FLIPS:
                        async with Steady(fleet, mix, CLIENTS, expected) as steady:
                            await become(fleet, roles)
                            found = await steady.inside(fitting[mix.name].times(SLACK), COUNT)
                        answers += steady.answers
                        print(mix.name, "fitting", fitting[mix.name], "followed", found, len(steady.answers))
                if server is not None:
                    server.until_filled(DASHBOARD)
            series.shutdown()
    assert [one.error for one in answers if one.error] == []
    assert all(one.right for one in answers)
    assert [(move["source"], move["target"]) for move in controlled.moves] == [
        ("decode", "prefill"),
        ("prefill", "decode"),
        ("decode", "prefill"),
    ]


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
