"""A switch on an instance whose engine is scripted, behind the real gate in a real FastAPI application."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from vllm_suite.roles.gate import PROBE_HEADER, REFUSED_HEADER, STAGE_HEADER, Door, Gate
from vllm_suite.roles.instance import EngineDied, Report, Settings, Switcher, SwitchError
from vllm_suite.roles.state import Deadlines, Refused, RoleState

SHORT_S = 0.3


class Scripted:
    """`faults` are names of calls that go wrong: hang_*, raise_*, wrong_*, deaf (limits that do not change)."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.faults: set[str] = set()
        self.limits = {"tokens": 100}
        self.calls: list[str] = []
        self.hold = asyncio.Event()
        self.hold.set()
        app = FastAPI()
        app.add_middleware(Gate, door=door)

        @app.post("/v1/completions")
        async def completions(request: Request) -> dict[str, Any]:
            await request.body()
            if PROBE_HEADER not in request.headers:
                await self.hold.wait()
            return {"tokens": [1, 2]}

        @app.post("/tokenize")
        async def tokenize() -> dict[str, Any]:
            return {}

        self.app = app
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x")

    async def _may_fail(self, what: str) -> None:
        self.calls.append(what)
        # "...@phase": in that phase alone.
        faults = {fault.removesuffix(f"@{self.door.state.phase}") for fault in self.faults}
        if f"hang_{what}" in faults:
            await asyncio.sleep(30)
        if f"raise_{what}" in faults:
            raise RuntimeError(what)
        if f"die_{what}" in faults:
            raise EngineDied

    async def unfinished(self) -> int:
        await self._may_fail("unfinished")
        return 0

    async def set_role(self, role: str) -> Settings:
        await self._may_fail(f"set_{role}")
        before = dict(self.limits)
        if "deaf" not in self.faults:
            self.limits["tokens"] = {"decode": 100, "any": 100}.get(role, 50)
        wanted = {"decode": 100, "any": 100}.get(role, 50)
        if self.limits["tokens"] != wanted:
            raise SwitchError(f"tokens is {self.limits['tokens']}, not {wanted}")
        return Settings(before, dict(self.limits))

    async def probe(self, stage: str | None) -> object:
        await self._may_fail(f"probe_{stage or 'plain'}")
        headers = {**({STAGE_HEADER: stage} if stage else {}), PROBE_HEADER: self.door.probe_key}
        answer = await self.client.post("/v1/completions", headers=headers)
        if answer.status_code != 200:
            raise SwitchError(f"the probe got {answer.status_code}")
        tokens = answer.json()["tokens"]
        return [9] if "wrong_probe" in self.faults and self.door.state.phase == "switching" else tokens

    async def refuses(self, stage: str) -> bool:
        await self._may_fail(f"refuses_{stage}")
        headers = {STAGE_HEADER: stage, PROBE_HEADER: self.door.probe_key}
        return (await self.client.post("/v1/completions", headers=headers)).status_code == 503

    async def send(self, stage: str | None = None, path: str = "/v1/completions", **headers: str) -> httpx.Response:
        return await self.client.post(path, headers={**({STAGE_HEADER: stage} if stage else {}), **headers})


@pytest.fixture
async def made() -> AsyncIterator[tuple[Switcher, Scripted, list[Report]]]:
    door, reports = Door(RoleState("decode")), list[Report]()
    engine = Scripted(door)
    switcher = Switcher(door, engine, ("prefill", "decode", "any"), ended=reports.append)
    yield switcher, engine, reports
    switcher.close()
    await engine.client.aclose()


Made = tuple[Switcher, Scripted, list[Report]]


async def test_a_switch_drains_verifies_and_changes_what_is_taken(made: Made) -> None:
    switcher, engine, reports = made
    engine.hold.clear()
    old = asyncio.create_task(engine.send("decode"))
    while not engine.door.running:
        await asyncio.sleep(0.01)
    switcher.begin("prefill", 0)
    await asyncio.sleep(0.1)
    assert switcher.state.phase == "closing"
    for stage in ("decode", "prefill", None):
        refusal = await engine.send(stage)
        assert (refusal.status_code, refusal.headers[REFUSED_HEADER]) == (503, "role")
        assert "is closing" in refusal.json()["error"]["message"]
    assert (await engine.send(path="/tokenize")).status_code == 200
    engine.hold.set()
    assert (await old).status_code == 200
    await switcher.settled()
    assert (switcher.state.role, switcher.state.epoch, switcher.state.phase) == ("prefill", 1, "serving")
    [report] = reports
    assert report.outcome == "switched"
    assert report.changed == {"tokens": [100, 50]}
    assert report.accepts == {"prefill": [False, True], "decode": [True, False]}
    assert report.verified == ["served prefill", "refused decode"]
    assert set(report.seconds) == {"closing", "drained", "switching", "verified"}
    assert [(await engine.send(stage)).status_code for stage in ("prefill", "decode", None)] == [200, 503, 200]
    assert engine.door.running == 0


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("hang_unfinished", "back", "closing took longer than 0.3 s"),
        ("raise_probe_plain", "back", "drained: RuntimeError"),
        ("hang_set_prefill", "back", "switching took longer than 0.3 s"),
        ("raise_set_prefill", "back", "switching: RuntimeError"),
        ("deaf", "back", "switching: tokens is 100, not 50"),
        ("raise_probe_prefill", "back", "switching: RuntimeError"),
        ("raise_refuses_decode", "back", "drained: RuntimeError"),
        ("hang_probe_plain@drained", "back", "drained took longer than 0.3 s"),
        ("hang_unfinished@verified", "back", "verified took longer than 0.3 s"),
        ("raise_unfinished@verified", "back", "verified: RuntimeError"),
        ("die_unfinished@verified", "out", "the engine has ended"),
        ("die_set_prefill", "out", "the engine has ended"),
        ("raise_set_prefill raise_set_decode", "out", "then restoring: RuntimeError"),
        ("raise_set_prefill hang_set_decode", "out", "then restoring took longer"),
    ],
)
async def test_a_failed_switch_goes_back_or_out(made: Made, fault: str, outcome: str, reason: str) -> None:
    switcher, engine, reports = made
    engine.faults = set(fault.split())
    if found := re.search(r"(\w+) took longer", reason):
        switcher.deadlines = Deadlines(**{found[1]: SHORT_S})
    switcher.begin("prefill", 0)
    await switcher.settled()
    assert reports[0].outcome == outcome
    assert reason in str(reports[0].reason)
    assert (switcher.state.role, switcher.state.epoch) == ("decode", 0)
    assert engine.limits == {"tokens": 100} or outcome == "out"
    served = (await engine.send("decode")).status_code == 200
    assert (switcher.state.phase, served) == (("serving", True) if outcome == "back" else ("out", False))
    if outcome == "back":
        engine.faults.clear()
        switcher.deadlines = Deadlines()
        switcher.begin("prefill", 0)
        await switcher.settled()
        assert switcher.state.epoch == 1


async def test_a_wrong_answer_is_no_success(made: Made) -> None:
    switcher, engine, reports = made
    engine.faults = {"wrong_probe"}
    switcher.begin("any", 0)
    await switcher.settled()
    assert reports[0].outcome == "back"
    assert "[9], and [1, 2] before" in str(reports[0].reason)


@pytest.mark.parametrize(
    ("target", "reason"), [("any", "nothing has changed: as decode"), ("prefill", "a decode request is still taken")]
)
async def test_a_switch_that_does_nothing_is_no_success(
    made: Made, monkeypatch: pytest.MonkeyPatch, target: Any, reason: str
) -> None:
    switcher, engine, reports = made
    # Behind this door every request comes in, whatever the role.
    monkeypatch.setattr(Door, "takes", lambda self, stage, probe: True)
    switcher.begin(target, 0)
    await switcher.settled()
    assert reports[0].outcome == "back"
    assert reason in str(reports[0].reason)
    assert (switcher.state.role, switcher.state.epoch, engine.limits) == ("decode", 0, {"tokens": 100})


async def test_work_that_does_not_end_costs_the_switch_and_no_request(made: Made) -> None:
    switcher, engine, reports = made
    switcher.deadlines = Deadlines(closing=SHORT_S)
    engine.hold.clear()
    old = asyncio.create_task(engine.send("decode"))
    while not engine.door.running:
        await asyncio.sleep(0.01)
    switcher.begin("prefill", 0)
    await switcher.settled()
    assert reports[0].outcome == "back"
    engine.hold.set()
    assert (await old).status_code == 200


async def test_a_switch_that_is_broken_off_leaves_nothing_in_between(made: Made) -> None:
    switcher, engine, _ = made
    engine.hold.clear()
    old = asyncio.create_task(engine.send("decode"))
    while not engine.door.running:
        await asyncio.sleep(0.01)
    switcher.begin("prefill", 0)
    await asyncio.sleep(0.05)
    assert switcher.state.phase == "closing"
    switcher.close()
    async with asyncio.timeout(30):
        while switcher.state.phase == "closing":
            await asyncio.sleep(0.01)
    assert switcher.state.phase == "out"
    assert (await engine.send("decode")).status_code == 503
    engine.hold.set()
    assert (await old).status_code == 200


async def test_what_is_not_begun(made: Made) -> None:
    switcher, _, reports = made
    with pytest.raises(SwitchError, match="cannot be encode"):
        switcher.begin("encode", 0)
    for target, epoch, reason in (("prefill", 1, "stale"), ("decode", 0, "noop")):
        with pytest.raises(Refused) as refusal:
            switcher.begin(target, epoch)  # type: ignore[arg-type]
        assert refusal.value.reason == reason
    assert not reports


async def test_a_probe_key_is_needed_to_pass_a_closed_gate(made: Made) -> None:
    switcher, engine, _ = made
    engine.faults = {"hang_probe_plain"}
    switcher.begin("prefill", 0)
    while switcher.state.phase == "closing":
        await asyncio.sleep(0.01)
    assert switcher.state.phase == "drained"
    assert (await engine.send("decode", **{PROBE_HEADER: "0" * 32})).status_code == 503
    assert (await engine.send("decode", **{PROBE_HEADER: engine.door.probe_key})).status_code == 200
