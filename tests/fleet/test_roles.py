"""Two instances of pool `any` that change their roles under load: nothing is lost, nothing is wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import CONTROL_KEY, ENGINE_KEY, Fleet, prompt, request, run_of_ports, running, spec, transfer

# Shorter prompts go straight to whoever decodes.
DISAGGREGATED = 32
LIMITS = {"decode": {"max_num_batched_tokens": 64}, "prefill": {"max_num_seqs": 2}}


@pytest.fixture(scope="module")
def fleet_process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("roles")
    wanted = spec(model, folder / "logs")
    wanted["pools"] = {"any": {"replicas": 2, "engine": {"kv_transfer_config": transfer("any")}}}
    wanted["env"]["VLLM_SUITE_ROLE_LIMITS"] = json.dumps(LIMITS)
    wanted["local"] |= {"first_port": run_of_ports(2), "first_side_channel_port": run_of_ports(2)}
    wanted["router"]["disaggregation"]["min_prompt_tokens"] = DISAGGREGATED
    wanted["router"]["timeouts"]["prefill_s"] = 120.0
    with running(folder, wanted) as process:
        yield process, folder / "logs"


@pytest.fixture
async def fleet(fleet_process: tuple[Any, Path]) -> AsyncIterator[Fleet]:
    process, log_dir = fleet_process
    async with aiohttp.ClientSession() as session:
        yield Fleet(process, log_dir, session)


async def role(fleet: Fleet, name: str) -> dict[str, Any]:
    return (await fleet.get(name, "/suite/v1/role", CONTROL_KEY)).json


async def switch(fleet: Fleet, name: str, target: str, **fields: Any) -> dict[str, Any]:
    """Switch and wait for the end; the report of the attempt."""
    now = await role(fleet, name)
    body = {"role": target, "epoch": now["epoch"], "role_epoch": now["role_epoch"], **fields}
    headers = {"Authorization": f"Bearer {CONTROL_KEY}"}
    async with fleet.session.post(fleet.url(name) + "/suite/v1/role", json=body, headers=headers) as answer:
        assert answer.status == 202, await answer.text()
    deadline = time.monotonic() + 150
    while (now := await role(fleet, name))["last"]["outcome"] is None:
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.1)
    last: dict[str, Any] = now["last"]
    assert last["outcome"] == "switched", now
    assert (now["role"], now["phase"]) == (target, "serving")
    return last


async def known(fleet: Fleet, name: str, wanted: str) -> None:
    """The router has followed."""
    for _ in range(100):
        rows = (await fleet.get("router", "/suite/v1/instances", CONTROL_KEY)).json["instances"]
        if any(row["instance_id"].endswith(name) and row["role"] == wanted and row["ready"] for row in rows):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the router does not know {name} as {wanted}")


@pytest.mark.slow
async def test_roles_change_under_load(fleet: Fleet) -> None:
    texts = [prompt(40 + 25 * i, 900 + i) for i in range(6)]
    alone = [(await fleet.post(request(text), "any-0")).tokens for text in texts]
    assert (await fleet.get("any-0", "/suite/v1/role", ENGINE_KEY)).status == 401
    ends, answers = asyncio.Event(), list[bool]()

    async def client(index: int) -> None:
        turn = index
        while not ends.is_set():
            text = turn % len(texts)
            answers.append((await fleet.post(request(texts[text]))).tokens == alone[text])
            turn += 1

    clients = [asyncio.create_task(client(index)) for index in range(3)]
    reports = []
    try:
        for name, target in (("any-0", "prefill"), ("any-1", "decode"), ("any-0", "decode"), ("any-1", "prefill")):
            reports.append(await switch(fleet, name, target))
            await known(fleet, name, target)
            before = len(answers)
            while len(answers) < before + 6:
                await asyncio.sleep(0.05)
                assert not any(one.done() for one in clients), "a request failed"
    finally:
        ends.set()
        await asyncio.gather(*clients, return_exceptions=True)
    assert all(answers)
    assert [report["changed"] for report in reports] == [
        {"max_num_seqs": [8, 2]},
        {"max_num_batched_tokens": [2048, 64]},
        {"max_num_batched_tokens": [2048, 64], "max_num_seqs": [2, 8]},
        {"max_num_batched_tokens": [64, 2048], "max_num_seqs": [8, 2]},
    ]
    print("switches", json.dumps(reports))
    # Pulled by both, each while it decoded.
    for name in ("any-0", "any-1"):
        assert await fleet.metric(name, "vllm_suite_kv_pulls_total", outcome="ok") > 0
        assert await fleet.metric(name, "vllm_suite_role_switches_total", outcome="switched") == 2


@pytest.mark.slow
async def test_what_waits_goes_back_to_the_router(fleet: Fleet) -> None:
    for name in ("any-0", "any-1"):
        if (await role(fleet, name))["role"] != "any":
            await switch(fleet, name, "any")
        await known(fleet, name, "any")
    # Handed over, of which the prefills wait; and straight to decode, half of them streamed.
    long = [request(prompt(1200, 300 + i), 2) for i in range(4)]
    short = [request(prompt(DISAGGREGATED // 2, 400 + i), 120) for i in range(4)]
    alone = [(await fleet.post(body, "any-0")).tokens for body in (*long, *short)]
    before = await fleet.metric("router", "vllm_suite_router_upstream_errors_total", kind="role")

    async def ask(index: int) -> bool:
        which = index % 8
        body = (*long, *short)[which]
        if index % 16 < 8:
            return (await fleet.post(body)).tokens == alone[which]
        answer = await fleet.post({**body, "stream": True})
        assert answer.status == 200, answer.text
        assert answer.text.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return [token for event in events for token in event["choices"][0]["token_ids"] or []] == alone[which]

    async def gives_back(target: str, stage: str) -> int:
        """Switch any-0 amid so many clients that twice what it runs waits there."""
        clients = [asyncio.create_task(ask(index)) for index in range(96)]
        deadline = time.monotonic() + 120
        while await fleet.metric("any-0", "vllm:num_requests_waiting") < 12:
            assert time.monotonic() < deadline, "nothing waits"
            await asyncio.sleep(0.05)
        report = await switch(fleet, "any-0", target, give_back=True)
        assert all(await asyncio.gather(*clients))
        print("given back", report["given_back"], "draining", report["seconds"]["closing"])
        assert report["given_back"][stage] > 0
        assert (
            await fleet.metric("any-0", "vllm_suite_role_given_back_total", stage=stage) == report["given_back"][stage]
        )
        return sum(report["given_back"].values())

    # As long as nobody else decodes alone, each does whole requests.
    back = await gives_back("prefill", "decode")
    await known(fleet, "any-0", "prefill")
    back += await gives_back("decode", "prefill")
    # To the router they came as requests that nobody had begun.
    roles = await fleet.metric("router", "vllm_suite_router_upstream_errors_total", kind="role")
    assert roles - before >= back
    await fleet.idle(roles=("any-0", "any-1"))
