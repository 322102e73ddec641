"""The controller and the command line over a real router and instances with the real gate and state machine."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry
from scripted import Instance

from vllm_suite.cli.main import main
from vllm_suite.roles.client import Access
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.controller import Controller
from vllm_suite.roles.gate import REFUSED, REFUSED_HEADER, STAGE_HEADER, Door
from vllm_suite.roles.instance import Settings, Switcher, SwitchError
from vllm_suite.roles.state import Deadlines, Refused, RoleState

KEY = {"Authorization": "Bearer c"}


@dataclass
class Changing(Instance):
    """A scripted instance with the real switch over a scripted engine.

    `wrong` makes its probes fail; `knows` are the fields of a switch that its version takes; `asked` those it was sent.
    """

    wrong: bool = False
    knows: tuple[str, ...] = ("role", "epoch", "role_epoch", "give_back")
    asked: list[list[str]] = field(default_factory=list)
    switcher: Switcher = field(init=False)

    def __post_init__(self) -> None:
        deadlines = Deadlines(closing=2, drained=1, switching=1, verified=1, restoring=1)
        self.switcher = Switcher(Door(RoleState(self.role)), self, ("prefill", "decode", "any"), deadlines)  # type: ignore[arg-type]

    async def unfinished(self) -> int:
        return 0

    async def set_role(self, role: str) -> Settings:
        return Settings({}, {})

    async def probe(self, stage: str) -> object:
        if self.wrong and self.switcher.state.phase == "switching":
            raise SwitchError("the probe failed")
        await asyncio.sleep(0.02)
        return [1]

    async def refuses(self, stage: str) -> bool:
        return not self.switcher.door.takes(stage, probe=True)  # type: ignore[arg-type]

    async def _state(self, request: web.Request) -> web.Response:
        answer = json.loads((await super()._state(request)).body or b"")  # type: ignore[arg-type]
        return web.json_response({**answer, **self._facts()})

    def _facts(self) -> dict[str, Any]:
        state = self.switcher.state
        return {
            "role": state.role,
            "role_epoch": state.epoch,
            "phase": state.phase,
            "target": state.target,
            "ready": state.phase == "serving" and self.ready,
            "can": list(self.switcher.can),
        }

    async def _role(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer c":
            return web.json_response({}, status=401)
        outcome, error = "ok", ""
        if request.method == "POST":
            body = await request.json()
            self.asked.append(sorted(body))
            if set(body) - set(self.knows):
                answer = {"outcome": "refused", "reason": "malformed", "error": "the body must be a JSON object with"}
                return web.json_response(answer, status=400)
            try:
                assert body["epoch"] == self.epoch
                self.switcher.begin(body["role"], body["role_epoch"])
                outcome = "begun"
            except Refused as refused:
                outcome, error = "noop" if refused.reason == "noop" else "refused", str(refused)
        last = self.switcher.last
        answer = {"outcome": outcome, "error": error, "epoch": self.epoch, **self._facts()}
        return web.json_response({**answer, "last": asdict(last) if last else None})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        door, stage = self.switcher.door, request.headers[STAGE_HEADER]
        if not door.state.accepts(stage):  # type: ignore[arg-type]
            await request.read()
            return web.json_response({"error": {}}, status=503, headers={REFUSED_HEADER: REFUSED})
        door.inside[stage] += 1
        try:
            return await super()._generate(request)
        finally:
            door.inside[stage] -= 1


@pytest.fixture
async def changing(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    started: list[Changing] = []
    add_get = web.UrlDispatcher.add_get

    async def start(role: str, **kwargs: Any) -> Changing:
        made = Changing(role=role, state_key="c", **kwargs)

        def add(self: web.UrlDispatcher, path: str, handler: Any, **options: Any) -> Any:
            if path == "/suite/v1/state":
                self.add_route("*", "/suite/v1/role", made._role)
            return add_get(self, path, handler, **options)

        with monkeypatch.context() as patch:
            patch.setattr(web.UrlDispatcher, "add_get", add)
            await made.start()
        started.append(made)
        return made

    yield start
    for made in started:
        made.switcher.close()
        await made.stop()


def controller(router: Any, **over: Any) -> tuple[Controller, CollectorRegistry]:
    registry = CollectorRegistry()
    spec = RolesSpec.model_validate({"agree": 1, "hold": 0, "every": 0.05, **over.pop("spec", {})})
    return Controller(spec, Access(router.url, "c", "c"), registry, **over), registry


AUTH = {"api_keys": ["k"], "control_key": "c"}


async def test_the_controller_follows_the_load_and_no_request_is_lost(changing, serve):
    prefills = [await changing("prefill") for _ in range(2)]
    decodes = [await changing("decode") for _ in range(2)]
    router = await serve([*prefills, *decodes], auth=AUTH)
    one, registry = controller(router)
    ends = asyncio.Event()
    answers: list[int] = []

    async def client(index: int) -> None:
        turn = 0
        while not ends.is_set():
            body = {"model": "tiny", "prompt": [index, turn, *range(50)], "max_tokens": 3}
            answers.append((await router.post(body, headers={"Authorization": "Bearer k"}))[0])
            turn += 1

    clients = [asyncio.create_task(client(index)) for index in range(4)]
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(one.run(session))
        for made in decodes:
            made.load = {"running": 5, "waiting": 20}
        await router.until(lambda: sum(p.switcher.state.role == "decode" for p in prefills) == 1)
        await asyncio.sleep(0.3)
        # The last prefill stays, however long the other queue is.
        assert sum(p.switcher.state.role == "prefill" for p in prefills) == 1
        await router.until(lambda: sum(m.role == "decode" for m in router.router.pool.members) == 3)
        task.cancel()
    await router.until(lambda: len(answers) > 20)
    ends.set()
    await asyncio.gather(*clients)
    assert set(answers) == {200}
    labels = {"source": "prefill", "target": "decode", "why": "rule", "outcome": "begun"}
    assert registry.get_sample_value("vllm_suite_roles_moves_total", labels) == 1
    assert registry.get_sample_value("vllm_suite_roles_instances", {"role": "decode"}) == 3


async def test_dry_run_and_a_fleet_that_is_not_all_known(changing, serve):
    fleet = [await changing("prefill"), await changing("prefill"), await changing("decode", load={"waiting": 9})]
    router = await serve(fleet, auth=AUTH)
    dry, registry = controller(router, dry_run=True)
    real, _ = controller(router)
    async with aiohttp.ClientSession() as session:
        assert (await dry.once(session)) is not None
        assert all(made.switcher.last is None for made in fleet)
        labels = {"source": "prefill", "target": "decode", "why": "rule", "outcome": "dry_run"}
        assert registry.get_sample_value("vllm_suite_roles_moves_total", labels) == 1
        fleet[0].state_mode = "500"
        assert (await real.once(session)) is None
        fleet[0].state_mode = "ok"
        assert (await real.once(session)) is not None
        # Switching now: nothing else begins.
        assert (await real.once(session)) is None
        await router.runner.cleanup()
        assert (await real.once(session)) is None


async def test_a_switch_that_fails_is_tried_again_and_leaves_no_hole(changing, serve):
    fleet = [await changing("prefill"), await changing("prefill"), await changing("decode", load={"waiting": 9})]
    for made in fleet:
        made.wrong = True
    router = await serve(fleet, auth=AUTH)
    one, _ = controller(router)
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            # A look that takes too long on a busy machine decides nothing.
            async with asyncio.timeout(60):
                while await one.once(session) is None:
                    await asyncio.sleep(0.05)
            await asyncio.gather(*(made.switcher.settled() for made in fleet))
    assert [made.switcher.state.role for made in fleet] == ["prefill", "prefill", "decode"]
    assert {made.switcher.state.phase for made in fleet} == {"serving"}


async def test_one_that_crashed_gets_the_role_that_somebody_had_given_it(changing, serve):
    fleet = [await changing("any"), await changing("decode"), await changing("decode")]
    router = await serve(fleet, auth=AUTH)
    one, registry = controller(router, spec={"start": {"decode": 3}, "hold": 60})
    fleet[0].switcher.begin("prefill", 0)
    async with aiohttp.ClientSession() as session:

        async def until(true: Callable[[], bool]) -> None:
            async with asyncio.timeout(60):
                while not true():
                    await one.once(session)
                    await asyncio.sleep(0.02)

        await until(lambda: registry.get_sample_value("vllm_suite_roles_instances", {"role": "prefill"}) == 1)
        # Another life at the same address.
        fleet[0].switcher.close()
        fleet[0].epoch, fleet[0].role = "another", "any"
        fleet[0].__post_init__()
        await until(lambda: fleet[0].switcher.state.phase == "serving" and fleet[0].switcher.state.epoch == 1)
    assert fleet[0].switcher.state.role == "prefill"
    labels = {"source": "any", "target": "prefill", "why": "again", "outcome": "begun"}
    assert registry.get_sample_value("vllm_suite_roles_moves_total", labels) == 1


async def test_an_older_instance_is_asked_without_what_it_does_not_know(changing, serve, monkeypatch, capsys):
    older = ("role", "epoch", "role_epoch")
    fleet = [await changing("prefill", knows=older) for _ in range(2)]
    fleet.append(await changing("decode", load={"waiting": 9}))
    router = await serve(fleet, auth=AUTH)
    one, registry = controller(router, spec={"hold": 60})
    async with aiohttp.ClientSession() as session:
        async with asyncio.timeout(60):
            while (move := await one.once(session)) is None:
                await asyncio.sleep(0.05)
        [moved] = [made for made in fleet if made.instance_id == move.instance.instance_id]
        await moved.switcher.settled()
        assert moved.switcher.state.role == "decode"
        assert moved.asked == [sorted([*older, "give_back"]), sorted(older)]
        labels = {"source": "prefill", "target": "decode", "why": "rule", "outcome": "begun"}
        assert registry.get_sample_value("vllm_suite_roles_moves_total", labels) == 1
        assert registry.get_sample_value("vllm_suite_roles_without_give_back_total") == 1
        # Once: what it refuses still is refused.
        moved.knows = ()
        monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", "c")
        assert await asyncio.to_thread(main, ["roles", "set", moved.instance_id, "prefill", "--url", router.url]) == 1
        said = capsys.readouterr().out
        assert "asked again without give_back" in said
        assert "refused: the body must be" in said
        assert len(moved.asked) == 4


async def test_the_command_line(changing, serve, monkeypatch, capsys):
    monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", "c")
    made = await changing("decode", instance_id="d0")
    router = await serve([made, await changing("prefill")], auth=AUTH)

    async def command(*words: str) -> tuple[int, str]:
        status = await asyncio.to_thread(main, ["roles", *words, "--url", router.url])
        out = capsys.readouterr()
        return status, out.out + out.err

    status, text = await command("status")
    assert status == 0
    assert "d0" in text
    assert "decode" in text
    status, text = await command("set", "d0", "decode")
    assert (status, "noop: the role is decode already" in text) == (0, True)
    status, text = await command("set", "d0", "prefill")
    assert status == 0
    assert "d0: switched: decode to prefill" in text
    assert "verified: served prefill, refused decode" in text
    made.wrong = True
    status, text = await command("set", "d0", "decode")
    assert status == 1
    assert "it is prefill and serving: switching: the probe failed" in text
    assert (await command("set", "nobody", "decode"))[0] == 1
    made.wrong = False
    status, text = await command("set", "d0", "decode", "--timeout", "0.001")
    assert (status, "has not ended in 0.001 s: d0 is" in text) == (1, True)
    monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", "wrong")
    assert "set VLLM_SUITE_CONTROL_KEY" in (await command("status"))[1]


@pytest.mark.parametrize("port", ["taken", "70000"])
def test_a_port_that_cannot_be_had_is_said(tmp_path, capsys, port):
    file = tmp_path / "fleet.yaml"
    file.write_text("{model: m, pools: {any: {}}}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = str(taken.getsockname()[1]) if port == "taken" else port
        words = ["roles", "control", str(file), "--url", "http://127.0.0.1:9", "--metrics-port", number]
        assert main(words) == 1
    assert f"series cannot be served at 127.0.0.1:{number}" in capsys.readouterr().err
