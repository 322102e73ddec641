"""Instances that change their roles under the router: it follows, and no request is lost."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from scripted import REFERENCE, Instance

from vllm_suite.roles.gate import REFUSED, REFUSED_HEADER, STAGE_HEADER
from vllm_suite.roles.state import serves

LONG = list(range(100))


@dataclass
class Switching(Instance):
    """Does the work of its role, refuses the other, and all while it is not serving."""

    phase: str = "serving"
    role_epoch: int = 0
    told: str | None = None  # what its state says instead of the truth: news that are late
    taken: list[str] = field(default_factory=list)
    refused: int = 0
    polls: int = 0

    async def _state(self, request: web.Request) -> web.Response:
        self.polls += 1
        answer = json.loads((await super()._state(request)).body or b"")  # type: ignore[arg-type]
        answer |= {"role_epoch": self.role_epoch, "phase": self.phase, "role": self.told or self.role}
        answer["ready"] = self.ready and (self.phase == "serving" or self.told is not None)
        return web.json_response(answer)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        stage: Any = request.headers[STAGE_HEADER]
        if self.phase != "serving" or not serves(self.role, stage):  # type: ignore[arg-type]
            self.refused += 1
            await request.read()
            return web.json_response({"error": {}}, status=503, headers={REFUSED_HEADER: REFUSED})
        self.taken.append(stage)
        return await super()._generate(request)


@pytest.fixture
async def switching() -> AsyncIterator[Any]:
    started: list[Switching] = []

    async def start(role: str, **kwargs: Any) -> Switching:
        made = Switching(role=role, **kwargs)
        await made.start()
        started.append(made)
        return made

    yield start
    for made in started:
        await made.stop()


def body(**over: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": LONG, "max_tokens": 5, **over}


async def test_instances_are_told_the_stage(switching, serve):
    p, d = await switching("prefill"), await switching("decode")
    router = await serve([p, d])
    status, _ = await router.post(body(), headers={STAGE_HEADER: "encode", REFUSED_HEADER: "role"})
    assert status == 200
    assert (p.taken, d.taken) == (["prefill"], ["decode"])
    assert d.seen[0].headers.getall(STAGE_HEADER) == ["decode"]
    assert REFUSED_HEADER not in d.seen[0].headers


async def test_the_router_follows_a_role(switching, serve):
    p, q, d = await switching("prefill"), await switching("prefill"), await switching("decode")
    router = await serve([p, q, d])
    member = router.router.pool.get(q.instance_id, q.epoch)
    q.role, q.role_epoch = "decode", 1
    await router.until(lambda: member.role == "decode")
    assert router.value("membership_events_total", event="switched") == 1
    rows = {row["instance_id"]: row for row in (await router.get("/suite/v1/instances"))[1]["instances"]}
    assert (rows[q.instance_id]["role"], rows[q.instance_id]["role_epoch"]) == ("decode", 1)
    await asyncio.gather(*(router.post(body(prompt=[i, *LONG])) for i in range(8)))
    assert set(p.taken) == {"prefill"}
    assert set(q.taken) == set(d.taken) == {"decode"}
    assert p.refused == q.refused == d.refused == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_refused_by_decode_goes_elsewhere_with_its_reference(switching, serve, stream):
    """Before the router has heard of the switch, and although no retry is allowed."""
    p, d = await switching("prefill"), await switching("decode", told="decode", instance_id="a")
    other = await switching("decode", instance_id="b")
    slow = {"poll_interval_s": 5.0, "poll_timeout_s": 5.0, "forget_after_s": 20.0}
    router = await serve([p, d, other], membership=slow, recovery={"decode_retries": 0})
    d.phase = "closing"
    polls = d.polls
    answers = await asyncio.gather(*(router.post(body(stream=stream, prompt=[i, *LONG])) for i in range(6)))
    assert [status for status, _ in answers] == [200] * 6
    assert d.refused >= 1
    assert not d.taken
    # The prefill was not done again, and its reference was used.
    assert len(p.taken) == 6
    assert all(seen.body["kv_transfer_params"] == REFERENCE for seen in other.seen)
    assert router.value("recoveries_total", step="decode_retry", reason="role") == d.refused
    assert router.value("upstream_errors_total", stage="decode", kind="role") == d.refused
    assert router.value("recoveries_total", step="reference_dropped", reason="role") == 0
    # It was asked at once, long before the next poll.
    await router.until(lambda: d.polls > polls, timeout_s=1.0)
    assert not router.router.pool.get("a", d.epoch).suspect


async def test_refused_by_prefill_is_no_attempt(switching, serve):
    first, second = await switching("prefill", told="prefill"), await switching("prefill", told="prefill")
    third, d = await switching("prefill"), await switching("decode")
    router = await serve([first, second, third, d], recovery={"prefill_retries": 0, "prefill_fallback": "error"})
    first.phase = second.phase = "closing"
    for i in range(4):
        assert (await router.post(body(prompt=[i, *LONG])))[0] == 200
    assert len(third.taken) == 4
    assert not first.taken + second.taken


async def test_a_refusal_ends_with_a_later_poll(switching, serve):
    d, other = await switching("decode"), await switching("decode")
    router = await serve([d, other])
    d.phase = "closing"
    member = router.router.pool.get(d.instance_id, d.epoch)
    await router.until(lambda: not member.ready)
    d.phase = "serving"  # the switch failed and it went back
    await router.until(lambda: member.ready)
    assert member.refused_at is None


async def test_a_request_waits_for_the_switch_of_the_only_instance(switching, serve):
    d = await switching("decode")
    router = await serve([d], limits={"wait_for_instance_s": 3.0}, recovery={"decode_retries": 0})
    d.phase = "closing"
    waiting = asyncio.create_task(router.post(body(prompt=[1])))
    await router.until(lambda: d.refused == 1)
    await asyncio.sleep(0.2)
    assert not waiting.done()
    d.phase = "serving"
    assert (await waiting)[0] == 200
    assert d.refused == 1


async def test_one_that_says_it_is_ready_and_refuses_is_left_alone(switching, serve):
    d = await switching("decode", told="decode")
    router = await serve([d])
    d.phase = "closing"
    status, answer = await router.post(body(prompt=[1]))
    assert status == 503
    assert "no instance does decode now" in answer["error"]["message"]
    assert d.refused == 3


async def test_no_request_is_lost_while_roles_change_again_and_again(switching, serve):
    a, b = await switching("prefill"), await switching("decode")
    movers = [await switching("prefill"), await switching("decode")]
    router = await serve([a, b, *movers])
    ends = asyncio.Event()

    async def switch(mover: Switching) -> None:
        while not ends.is_set():
            mover.phase = "closing"
            await asyncio.sleep(0.03)
            mover.role = "decode" if mover.role == "prefill" else "prefill"
            mover.role_epoch += 1
            mover.phase = "serving"
            await asyncio.sleep(0.08)

    async def client(index: int) -> list[int]:
        found = []
        for turn in range(1000):  # as long as it takes until roles have changed often enough
            if turn >= 20 and min(mover.role_epoch for mover in movers) >= 3:
                break
            stream = bool(turn % 2)
            status, answer = await router.post(body(prompt=[index, turn, *LONG], stream=stream))
            found.append(status if not stream or answer.endswith(b"data: [DONE]\n\n") else 0)
        return found

    moving = [asyncio.create_task(switch(mover)) for mover in movers]
    answers = await asyncio.gather(*(client(index) for index in range(6)))
    ends.set()
    await asyncio.gather(*moving)
    assert min(map(len, answers)) >= 20
    assert {status for found in answers for status in found} == {200}
    assert min(mover.role_epoch for mover in movers) >= 3
    for one in (a, b, *movers):
        assert len(one.taken) == len(one.seen)
    assert set(a.taken) == {"prefill"}
    assert set(b.taken) == {"decode"}
