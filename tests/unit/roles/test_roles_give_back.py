"""Queued requests that a switch sends back to the router, behind the real gate: nothing of them was begun."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from vllm_suite.compat.role_queue import part_of, untouched
from vllm_suite.roles.gate import REFUSED_HEADER, STAGE_HEADER, Door, Gate
from vllm_suite.roles.instance import POLL_S, Report, Settings, Switcher
from vllm_suite.roles.seen import Seen, others_take
from vllm_suite.roles.state import RoleState


class Server:
    """An engine with a queue behind an API server. It answers a request once that is begun, in two pieces, and ends one
    whose client has left, as vLLM does. `crashes`: the server takes that badly."""

    def __init__(self, door: Door) -> None:
        self.begun: dict[str, asyncio.Event] = {}
        self.may_end = asyncio.Event()
        self.left: list[str] = []
        self.crashes = False
        self.door = door
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=Gate(self.app, door)), base_url="http://x", timeout=None
        )

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        asked = json.loads(body)
        name = asked["name"]
        head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
        if asked.get("stream"):
            await send(head)
        begun = self.begun.setdefault(name, asyncio.Event())
        leaving, beginning = asyncio.ensure_future(receive()), asyncio.ensure_future(begun.wait())
        done, pending = await asyncio.wait((leaving, beginning), return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if leaving in done:
            assert leaving.result()["type"] == "http.disconnect"
            self.left.append(name)
            await send(head)
            await send({"type": "http.response.body", "body": b"nobody reads this"})
            if self.crashes:
                raise RuntimeError("the client has left")
            return
        if not asked.get("stream"):
            await self.may_end.wait()
            await send(head)
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"two"})

    async def send(self, name: str, stage: str | None = "prefill", **fields: Any) -> httpx.Response:
        headers = {"X-Request-Id": fields.pop("header", name), **({STAGE_HEADER: stage} if stage else {})}
        return await self.client.post("/v1/completions", json={"name": name, **fields}, headers=headers)

    # What a switch asks of the engine.

    async def unfinished(self) -> int:
        return 0

    async def untouched(self, names: Collection[str]) -> set[str]:
        return {name for name in names if name in self.begun and not self.begun[name].is_set()}

    async def set_role(self, role: str) -> Settings:
        return Settings({"n": 1}, {"n": 2})

    async def probe(self, stage: str | None) -> object:
        return 1

    async def refuses(self, stage: str) -> bool:
        return not self.door.takes(stage, True)  # type: ignore[arg-type]


@pytest.fixture
async def made() -> AsyncIterator[tuple[Server, Switcher, list[Report]]]:
    reports: list[Report] = []
    door = Door(RoleState("any"))
    server = Server(door)
    switcher = Switcher(door, server, ("prefill", "decode", "any"), ended=reports.append)
    yield server, switcher, reports
    switcher.close()
    await server.client.aclose()


Made = tuple[Server, Switcher, list[Report]]


async def arrived(server: Server, *names: str) -> None:
    async with asyncio.timeout(30):
        while not set(names) <= set(server.begun):
            await asyncio.sleep(0.005)


def refused(answer: httpx.Response) -> bool:
    return (
        answer.status_code == 503 and answer.headers.get(REFUSED_HEADER) == "role" and b"nobody" not in answer.content
    )


async def test_what_is_queued_goes_back_and_what_is_begun_is_served(made: Made) -> None:
    server, switcher, reports = made
    asked = {
        "queued": server.send("queued"),
        "stream": server.send("stream", "decode", stream=True),
        "running": server.send("running"),
        "streaming": server.send("streaming", "decode", stream=True),
        "direct": server.send("direct", None),
        "twin a": server.send("twin a", header="twin"),
        "twin b": server.send("twin b", header="twin"),
    }
    tasks = {name: asyncio.create_task(call) for name, call in asked.items()}
    await arrived(server, *asked)
    server.begun["twin"] = asyncio.Event()
    for name in ("running", "streaming"):
        server.begun[name].set()
    switcher.begin("decode", 0, give_back=True)
    async with asyncio.timeout(30):
        assert refused(await tasks["queued"])
        assert refused(await tasks["stream"])
    assert sorted(server.left) == ["queued", "stream"]
    assert switcher.state.phase == "closing"
    # Who does not say a stage cannot send it elsewhere; of two with one name nobody knows which is meant.
    for name in ("direct", "twin a", "twin b"):
        assert not tasks[name].done()
        server.begun[name].set()
    server.may_end.set()
    async with asyncio.timeout(30):
        for name in ("running", "streaming", "direct", "twin a", "twin b"):
            answer = await tasks[name]
            assert (answer.status_code, answer.content) == (200, b"one two")
        await switcher.settled()
    assert (reports[0].outcome, reports[0].given_back) == ("switched", {"prefill": 1, "decode": 1})
    assert (server.door.running, server.door.visits) == (0, set())


async def test_nothing_goes_back_unasked(made: Made) -> None:
    server, switcher, reports = made
    task = asyncio.create_task(server.send("queued"))
    await arrived(server, "queued")
    switcher.begin("decode", 0)
    await asyncio.sleep(0.2)
    assert not task.done()
    server.begun["queued"].set()
    server.may_end.set()
    assert (await task).content == b"one two"
    await switcher.settled()
    assert (reports[0].outcome, reports[0].given_back) == ("switched", None)


@pytest.mark.parametrize("role", ["any", "encode"])
async def test_what_an_any_encodes_for_others_stays(made: Made, role: Any) -> None:
    """It does so where no encoder is ready, so perhaps nobody else would; an encoder's work others were asked for."""
    server, switcher, reports = made
    server.door.state = RoleState(role)
    switcher.can = ("encode", *switcher.can)
    asked = {"item": "encode"} | ({"prompt": "prefill"} if role == "any" else {})
    tasks = {name: asyncio.create_task(server.send(name, stage)) for name, stage in asked.items()}
    await arrived(server, *asked)
    switcher.begin("decode", 0, give_back=True)
    async with asyncio.timeout(30):
        assert refused(await tasks.popitem()[1])
        for name, task in tasks.items():
            await asyncio.sleep(3 * POLL_S)
            assert not task.done()
            server.begun[name].set()
            server.may_end.set()
            assert (await task).content == b"one two"
        await switcher.settled()
    assert (reports[0].outcome, reports[0].given_back) == ("switched", {list(asked.values())[-1]: 1})


async def test_a_server_that_takes_it_badly(made: Made) -> None:
    server, switcher, _ = made
    server.crashes = True
    task = asyncio.create_task(server.send("queued"))
    await arrived(server, "queued")
    switcher.begin("decode", 0, give_back=True)
    async with asyncio.timeout(30):
        assert refused(await task)
        await switcher.settled()
    assert server.door.running == 0


@pytest.mark.parametrize("stage", [None, "decode"])
async def test_a_request_that_ends_with_an_error_is_no_longer_inside(stage: str | None) -> None:
    door = Door(RoleState("any"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert door.running == 1
        raise RuntimeError("a fault")

    transport = httpx.ASGITransport(app=Gate(app, door))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        headers = {"X-Request-Id": "a", **({STAGE_HEADER: stage} if stage else {})}
        with pytest.raises(RuntimeError, match="a fault"):
            await client.post("/v1/completions", headers=headers)
    assert (door.running, door.visits) == (0, set())


async def test_an_answer_that_has_begun_stays() -> None:
    """Whatever the engine says: with the first byte out, it is too late."""
    door = Door(RoleState("any"))
    server = Server(door)
    task = asyncio.create_task(server.send("a", "decode", stream=True))
    await arrived(server, "a")
    assert door.open_names() == {"a"}
    server.begun["a"].set()
    async with asyncio.timeout(30):
        while door.open_names():
            await asyncio.sleep(0.005)
    assert not door.give_back({"a"})
    server.may_end.set()
    assert (await task).content == b"one two"
    await server.client.aclose()


async def test_a_client_that_leaves_is_seen() -> None:
    door, seen = Door(RoleState("any")), list[str]()
    gone = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([(await receive())["type"], (await receive())["type"]])

    async def receive() -> dict[str, Any]:
        if not seen and not gone.is_set():
            gone.set()
            return {"type": "http.request", "body": b""}
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nothing is answered")

    headers = [(STAGE_HEADER.lower().encode(), b"decode"), (b"x-request-id", b"a")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await Gate(app, door)(scope, receive, send)
    assert seen == ["http.request", "http.disconnect"]
    assert (door.running, door.visits) == (0, set())


@pytest.mark.parametrize(
    ("request_id", "part"),
    [
        ("cmpl-a-0", ("a", 0)), ("cmpl-a-0-12", ("a-0", 12)), ("chatcmpl-a-0", ("a-0", 0)), ("cmpl-a", ("", 0)),
        ("embd-a-0", ("", 0)), ("", ("", 0)),
    ],
)  # fmt: skip
def test_names_of_engine_requests(request_id: str, part: tuple[str, int]) -> None:
    assert part_of(request_id) == part


def state(name: str, n: int | None = None) -> Any:
    return SimpleNamespace(external_req_id=name, parent_req=SimpleNamespace(n=n) if n else None)


def test_a_request_of_several_prompts_is_queued_where_all_are() -> None:
    names = ("cmpl-a-0", "cmpl-a-1", "cmpl-b-0", "cmpl-b-1", "chatcmpl-c", "cmpl-d-0")
    states = [(f"{name}-x", state(name)) for name in names]
    waiting = {"cmpl-a-0-x", "cmpl-a-1-x", "cmpl-b-0-x", "chatcmpl-c-x", "cmpl-d-0-x"}
    assert untouched({"a", "b", "c", "e"}, states, waiting) == {"a", "c"}


def test_a_part_that_is_done_was_begun() -> None:
    """The front end has forgotten it, and the rest still waits: prompt 0 of `a`, 1 of `b`, one sequence of `c`."""
    states = [
        ("cmpl-a-1-x", state("cmpl-a-1")),
        ("cmpl-b-0-x", state("cmpl-b-0")),
        ("cmpl-b-2-x", state("cmpl-b-2")),
        ("1_chatcmpl-c-x", state("chatcmpl-c", 2)),
        ("0_chatcmpl-d-x", state("chatcmpl-d", 2)),
        ("1_chatcmpl-d-x", state("chatcmpl-d", 2)),
    ]
    assert untouched({"a", "b", "c", "d"}, states, {request for request, _ in states}) == {"d"}


@pytest.mark.parametrize(
    ("one", "others", "take"),
    [
        ("prefill", ["prefill"], True),
        ("prefill", ["any"], True),
        ("prefill", ["decode"], False),
        ("any", ["prefill", "decode"], True),
        ("any", ["decode"], False),
        ("encode", ["any"], True),
        ("encode", ["prefill", "decode"], False),
        ("decode", [], False),
    ],
)
def test_others_have_to_take_what_goes_back(one: Any, others: list[Any], take: bool) -> None:
    def seen(i: int, role: Any, ready: bool = True) -> Seen:
        return Seen(str(i), "", "e", role, 0, "serving" if ready else "closing", ready, (), 0, 0)

    fleet = [seen(i, role) for i, role in enumerate([one, *others])]
    assert others_take(fleet, fleet[0]) is take
    assert not others_take([fleet[0], *(seen(1 + i, role, False) for i, role in enumerate(others))], fleet[0])
