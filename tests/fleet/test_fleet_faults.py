"""Instances that die, freeze and come back: no wrong answer, no hang, no block lost."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import time

import aiohttp
from harness import CONTROL_KEY, KEY, Fleet, prompt, request

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


async def epochs(fleet: Fleet) -> dict[str, str]:
    """What the router knows: the epoch of each instance by its id."""
    members = (await fleet.get("router", "/suite/v1/instances", CONTROL_KEY)).json["instances"]
    return {m["instance_id"]: m["epoch"] for m in members}


async def forgotten(fleet: Fleet, name: str) -> None:
    """A vanished instance is forgotten within 2 s."""
    begun = time.monotonic()
    while any(name in known for known in await epochs(fleet)):
        assert time.monotonic() - begun < 2.5
        await asyncio.sleep(0.1)


async def test_prefill_killed_between_its_answer_and_the_pull(fleet: Fleet) -> None:
    before = await epochs(fleet)
    text = prompt(400, 70)
    alone = await fleet.post(request(text), "decode")
    assert (await fleet.post(request(text))).tokens == alone.tokens  # the two have shaken hands
    kv = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json["kv_transfer_params"]
    epoch = await fleet.epoch("prefill")
    fleet.signal("prefill", signal.SIGKILL)
    watching = asyncio.create_task(forgotten(fleet, "prefill"))
    begun = time.monotonic()
    answer = await fleet.post(request(text, kv_transfer_params=kv), "decode")
    assert answer.tokens == alone.tokens
    assert time.monotonic() - begun < 5
    # The router goes on with what is left.
    assert (await fleet.post(request(text))).tokens == alone.tokens
    await watching
    await fleet.ready("prefill", epoch)
    after = await epochs(fleet)
    assert set(after) == set(before)
    assert [name for name in after if after[name] != before[name]] == [name for name in after if "prefill" in name]
    # A new life on the same ports: the old reference is worthless, new ones are good.
    assert (await fleet.post(request(text, kv_transfer_params=kv), "decode")).tokens == alone.tokens
    pulls = await fleet.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok")
    assert (await fleet.post(request(text))).tokens == alone.tokens
    assert await fleet.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok") == pulls + 1


async def test_a_frozen_prefill_is_worked_around(fleet: Fleet) -> None:
    text = prompt(400, 71)
    alone = await fleet.post(request(text), "decode")
    fleet.freeze("prefill")
    try:
        begun = time.monotonic()
        assert (await fleet.post(request(text))).tokens == alone.tokens
        assert time.monotonic() - begun < 15
        await asyncio.sleep(3)  # forgotten by now
        begun = time.monotonic()
        assert (await fleet.post(request(text))).tokens == alone.tokens
        assert time.monotonic() - begun < 5
    finally:
        fleet.thaw("prefill")
    await fleet.ready("prefill")
    assert (await fleet.post(request(text))).tokens == alone.tokens


async def test_prefill_frozen_between_its_answer_and_the_pull(fleet: Fleet) -> None:
    text = prompt(400, 72)
    alone = await fleet.post(request(text), "decode")
    kv = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json["kv_transfer_params"]
    fleet.freeze("prefill")
    try:
        begun = time.monotonic()
        answer = await fleet.post(request(text, kv_transfer_params=kv), "decode", timeout_s=30)
        assert answer.tokens == alone.tokens
        assert time.monotonic() - begun < 10
    finally:
        fleet.thaw("prefill")
    await fleet.ready("prefill")


async def test_decode_killed_in_the_middle_of_a_stream(fleet: Fleet) -> None:
    body = json.dumps(request(prompt(300, 73), 1500, stream=True)).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    received = b""
    epoch = await fleet.epoch("decode")
    async with fleet.session.post(fleet.url("router") + "/v1/completions", data=body, headers=headers) as answer:
        async for chunk in answer.content:
            if not received:
                fleet.signal("decode", signal.SIGKILL)
            received += chunk
    events = [line[6:] for line in received.decode().splitlines() if line.startswith("data: ")]
    assert "[DONE]" not in events
    assert "error" in json.loads(events[-1])
    await fleet.ready("decode", epoch)
    text = prompt(300, 74)
    alone = await fleet.post(request(text), "decode")
    assert (await fleet.post(request(text))).tokens == alone.tokens


async def test_200_mixed_requests_while_an_instance_dies_and_returns(fleet: Fleet) -> None:
    """Every answer that claims success is right; what fails does so with a status, in time."""
    rng = random.Random(7)
    texts = [prompt(rng.randrange(4, 900), 7000 + i) for i in range(40)]
    expected = [(await fleet.post(request(text), "decode")).tokens for text in texts]
    slots = asyncio.Semaphore(8)
    wrong: list[int] = []
    epoch = await fleet.epoch("prefill")
    failed: list[str] = []

    async def one(i: int) -> None:
        async with slots:
            which = i % len(texts)
            stream = i % 3 == 0
            try:
                answer = await fleet.post(request(texts[which], stream=stream), timeout_s=60)
            except (TimeoutError, aiohttp.ClientError) as error:
                failed.append(repr(error))
                return
            if answer.status != 200:
                failed.append(answer.text)
                return
            tokens = streamed_tokens(answer.text) if stream else answer.tokens
            if tokens != expected[which]:
                wrong.append(i)

    async def killer() -> None:
        await asyncio.sleep(1.0)
        fleet.signal("prefill", signal.SIGKILL)

    await asyncio.gather(killer(), *(one(i) for i in range(200)))
    assert not wrong
    # Prefill is never the only way: decode computes by itself.
    assert not failed
    await fleet.ready("prefill", epoch)


def streamed_tokens(text: str) -> list[int]:
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [t for event in events if event != "[DONE]" for c in json.loads(event)["choices"] for t in c["token_ids"]]


async def test_an_idle_fleet_is_quiet(fleet: Fleet) -> None:
    """CPU seconds a second of all processes, with a lease outstanding that nobody fetches (stock: about one core)."""
    from harness import descendants

    await fleet.post(request(prompt(400, 75), 1, kv_transfer_params=PREFILL), "prefill")
    await asyncio.sleep(1.5)  # a worker spins for a second after its last step
    pids = [p for role in ("prefill", "decode") for pid in fleet.member(role)["pids"] for p in [pid, *descendants(pid)]]

    def ticks() -> int:
        total = 0
        for pid in set(pids):
            with open(f"/proc/{pid}/stat") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total

    start, begun = ticks(), time.monotonic()
    await asyncio.sleep(2.0)
    assert (ticks() - start) / 100 / (time.monotonic() - begun) < 0.4
