"""New processes under load: `vllm-suite restart` on a fleet, and two revisions side by side, every answer compared."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from flip import flip_spec, switch
from harness import CONTROL_KEY, Fleet, prompt, request, run_of_ports, running, spec

from vllm_suite.fleet.process import ready_members

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

TOKENS = 24


class Load:
    """Clients that ask until they are told to end; every answer is compared with what one engine says."""

    def __init__(self, fleet: Fleet, known: Sequence[tuple[list[int], list[int]]]) -> None:
        self._fleet, self._known = fleet, known
        self._ending = asyncio.Event()
        self.right = 0
        self.wrong: list[str] = []

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self._client(seed) for seed in range(clients)))

    def end(self) -> None:
        self._ending.set()

    async def _client(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self._ending.is_set():
            text, tokens = draw.choice(self._known)
            stream = draw.random() < 0.5
            answer = await self._fleet.post(request(text, TOKENS, stream=stream))
            got = streamed(answer.text) if stream and answer.status == 200 else None
            if got is None and answer.status == 200:
                got = answer.tokens
            if got == tokens:
                self.right += 1
            else:
                self.wrong.append(f"stream {stream}: {answer.status} {answer.text[-500:]}")


def streamed(text: str) -> list[int] | None:
    """Tokens of a whole stream; None where it broke off."""
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        return None
    return [t for event in events[:-1] for choice in json.loads(event)["choices"] for t in choice["token_ids"]]


async def known(fleet: Fleet, role: str) -> list[tuple[list[int], list[int]]]:
    found = []
    for number in range(12):
        text = prompt(30 + 40 * number, 900 + number)
        found.append((text, (await fleet.post(request(text, TOKENS), role)).tokens))
    return found


def several(folder: Path, model: Path, replicas: int) -> dict[str, Any]:
    wanted = spec(model, folder / "logs")
    for pool in wanted["pools"].values():
        pool["replicas"] = replicas
    wanted["local"] |= {
        "first_port": run_of_ports(2 * replicas),
        "first_side_channel_port": run_of_ports(2 * replicas),
    }
    return wanted


async def restart(fleet: Fleet, *words: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_suite.cli.main", "restart", "--log-dir", str(fleet.log_dir), *words,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_a_rolling_restart_loses_no_request(model: Path, tmp_path: Path) -> None:
    wanted = several(tmp_path, model, 2)
    names = [f"{role}-{index}" for role in ("prefill", "decode") for index in range(2)]
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            before = {name: await fleet.epoch(name) for name in names}
            load = Load(fleet, await known(fleet, "decode-0"))
            clients = asyncio.create_task(load.run(3))
            try:
                status, said = await restart(fleet, "--all")
            finally:
                load.end()
                await clients
            assert status == 0, said
            assert said.count("serves again after") == 4
            after = {name: await fleet.epoch(name) for name in names}
            assert not any(after[name] in (None, before[name]) for name in names)
            assert load.wrong == []
            assert load.right > 50
            # Nothing had to be worked around: nobody was asked who was on his way out.
            for step in ("decode_retry", "prefill_retry", "reference_dropped", "error"):
                assert await fleet.metric("router", "vllm_suite_router_recoveries_total", step=step) == 0, step
            for name in names:
                assert await fleet.metric(name, "vllm_suite_kv_refused_total") == 0
                assert fleet.member(name)["restarts"] == 1
            await fleet.idle(roles=names)


async def test_a_role_that_was_set_by_hand_stays(model: Path, tmp_path: Path) -> None:
    wanted = flip_spec(model, tmp_path / "logs", {})
    wanted["pools"]["any"]["replicas"] = 2
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            questions = await known(fleet, "any-1")
            await switch(fleet, "any-0", "prefill")
            load = Load(fleet, questions)
            clients = asyncio.create_task(load.run(3))
            before = await fleet.epoch("any-0")
            try:
                status, said = await restart(fleet, "fleet-any-0")
                # Prefilled there again: the longer ones of these prompts are.
                async with asyncio.timeout(60):
                    while not await fleet.metric("any-0", "vllm:request_success_total"):
                        await asyncio.sleep(0.5)
            finally:
                load.end()
                await clients
            assert (status, "fleet-any-0: prefill again" in said) == (0, True), said
            now = await state(fleet, "any-0")
            assert (now["role"], now["role_epoch"], now["epoch"] != before) == ("prefill", 1, True)
            assert load.wrong == []
            assert load.right > 20


async def test_two_revisions_behind_one_router(model: Path, tmp_path: Path) -> None:
    """As amid an upgrade: prefill and decode of an old and of a new revision, and then the old ones go.

    Every instance says in its state which model and layout its KV blocks are of, and the revision is part of that.
    """
    old, new = (several(tmp_path / name, model, 1) for name in ("old", "new"))
    for name, one in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        one["name"] = name
        one["engine"]["revision"] = name
        one["local"]["restart"] = {"first_delay": "1h", "max_delay": "1h"}
    members = [
        {"url": f"http://127.0.0.1:{new['local']['first_port'] + index}", "role": role}
        for index, role in enumerate(("prefill", "decode"))
    ]
    # The router notices by requests alone who has gone.
    slow = {"poll_interval_s": 15.0, "poll_timeout_s": 5.0, "forget_after_s": 120.0}
    old["router"] |= {"membership": {"static": members, **slow}, "policies": {"decode": "round_robin"}}
    with running(tmp_path / "new", new), running(tmp_path / "old", old) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "old/logs", session)
            fresh = Fleet(process, tmp_path / "new/logs", session)
            states = [await state(one, role) for one in (fleet, fresh) for role in ("prefill", "decode")]
            assert states[0]["kv"] == states[1]["kv"] != states[2]["kv"] == states[3]["kv"]
            questions = await known(fleet, "decode")
            async with asyncio.timeout(90):
                while len(ready_members((await fleet.get("router", "/suite/v1/instances", CONTROL_KEY)).json)) < 4:
                    await asyncio.sleep(0.5)

            async def ask_all() -> None:
                answers = await asyncio.gather(*(fleet.post(request(text, TOKENS)) for text, _ in questions))
                assert [answer.tokens for answer in answers] == [tokens for _, tokens in questions]

            async def count(name: str, **labels: str) -> float:
                return await fleet.metric("router", f"vllm_suite_router_{name}_total", **labels)

            await ask_all()
            for one in (fleet, fresh):
                # Each pulled from prefill of its own revision, and refused nothing.
                assert await one.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok") == len(questions) / 2
                assert await one.metric("decode", "vllm_suite_kv_refused_total") == 0
            assert await count("decisions", reason="prefill") == len(questions)
            assert await count("decisions", reason="other_version") == 0

            # The old decode goes: what the old prefill had computed for it is of no use to the new one.
            fleet.signal("decode", 9)
            await gone(fleet, "decode")
            await ask_all()
            # Some find it gone, the others that had chosen it see that it is suspect.
            retried = await count("recoveries", step="decode_retry", reason="connect")
            dropped = await count("recoveries", step="reference_dropped", reason="other_version")
            assert 1 <= retried <= dropped <= len(questions) / 2
            assert await fresh.metric("decode", "vllm_suite_kv_refused_total") == 0

            # The new prefill goes too: the old one is not asked for the new decode.
            fresh.signal("prefill", 9)
            await gone(fresh, "prefill")
            await ask_all()  # the first of them find out
            before = await count("picks", stage="prefill")
            await ask_all()
            assert await count("picks", stage="prefill") == before
            assert await count("decisions", reason="other_version") >= len(questions)
            assert await fresh.metric("decode", "vllm_suite_kv_refused_total") == 0


async def state(fleet: Fleet, role: str) -> dict[str, Any]:
    return (await fleet.get(role, "/suite/v1/state", CONTROL_KEY)).json


async def gone(fleet: Fleet, role: str) -> None:
    """Until nobody listens there."""
    async with asyncio.timeout(30):
        while fleet.member(role)["state"] != "restarting":
            await asyncio.sleep(0.1)
