"""The control routes on vLLM's own API server, built without an engine, under requests of any kind."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from fuzz_checks import DEADLINE_S, Log, complaints, examples, says_why
from hypothesis import event, example, given, note
from hypothesis import strategies as st
from shapes import ANY_JSON, HEADER, encoded, framed
from wild import Got, exchange

from vllm_suite.roles.client import read
from vllm_suite.roles.state import Refused

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
KEY = "control-key"


class Server:
    """vLLM's FastAPI application with the endpoint plugin, on uvicorn, on a port of its own."""

    def __init__(self, url: str, control: Any) -> None:
        self.url = url
        self.control = control


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    async for one in serving(monkeypatch):
        yield one


@pytest.fixture
async def locked(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """With a key of vLLM's."""
    async for one in serving(monkeypatch, "--api-key", "engine-key", "other-key"):
        yield one


async def serving(monkeypatch: pytest.MonkeyPatch, *options: str) -> AsyncIterator[Server]:
    monkeypatch.setenv("VLLM_PLUGINS", "vllm_suite_control")
    monkeypatch.setenv("VLLM_SUITE_CONTROL_KEY", KEY)
    monkeypatch.setenv("VLLM_SUITE_ROLE", "any")
    import uvicorn
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_suite.compat import endpoint

    made: list[Any] = []

    class Kept(endpoint.Control):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(endpoint, "Control", Kept)
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "tiny", *options])
    app = build_app(args, ("render",))
    [control] = made
    # As vLLM's render server does it: there is no engine.
    await control.init_state(None, app.state, args)
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off"))
    task = asyncio.create_task(running.serve())
    async with asyncio.timeout(30):
        while not running.started:
            await asyncio.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    yield Server(f"http://127.0.0.1:{port}", control)
    running.should_exit = True
    await task


def sendable(method: str, path: str, headers: list[tuple[bytes, bytes]], frame: tuple[bytes, bytes, bool]) -> bytes:
    length, body, _ = frame
    lines = b"".join(b"%b: %b\r\n" % header for header in headers)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    return head + lines + length + b"\r\n" + body


def has_length(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(name.lower() in (b"content-length", b"expect") for name, _ in headers)


_ROLE = st.sampled_from(["prefill", "decode", "any", "encode"])
_SWITCH = st.fixed_dictionaries(
    {"role": _ROLE | ANY_JSON, "epoch": st.text(max_size=16) | ANY_JSON, "role_epoch": st.integers(-1, 3) | ANY_JSON},
    optional={"give_back": st.booleans() | ANY_JSON, "more": ANY_JSON},
)
_BODY = st.one_of(
    st.builds(encoded, _SWITCH | ANY_JSON),
    st.binary(max_size=20),
    st.builds(lambda n: b"[" * n, st.sampled_from([900, 4000, 5000])),
    st.builds(lambda n: b'{"role_epoch": ' + b"9" * n + b"}", st.sampled_from([20, 4000, 5000])),
)
_AUTH = st.sampled_from(
    [b"Bearer control-key"] * 4 + [b"Bearer x", b"bearer control-key", b"Basic a", b"Bearer \xff", b""]
)
_PATHS = ["/suite/v1/role"] * 5 + ["/suite/v1/state"] * 2 + ["/suite/v1/role/", "/suite/v1/", "/suite/v1/role?a=%00"]
REQUEST = st.tuples(
    st.sampled_from(["POST"] * 4 + ["GET"] * 2 + ["PUT", "DELETE", "PATCH", "OPTIONS"]),
    st.sampled_from(_PATHS),
    _AUTH,
    st.lists(HEADER, max_size=2),
    _BODY.flatmap(framed),
)


async def _requests(server: Server, log: Log, drawn: tuple[str, str, bytes, Any, Any]) -> None:
    method, path, auth, headers, frame = drawn
    role = server.control._roles.door.state
    sent = sendable(method, path, [(b"Authorization", auth), *headers], frame)
    # uvicorn waits for the rest of a body as long as the client stays.
    got: Got = await exchange(server.url, [sent], DEADLINE_S, hang_up=not frame[2] or has_length(headers))
    note(f"{got.raw[:600]!r}")
    event(f"{method} {got.status}")
    assert got.ended, "the connection is stuck"
    if got.status is None:
        # The body never came to its end, and the client left.
        assert got.raw == b""
    else:
        assert got.status < 500
        assert got.status == 307 or got.status < 400 or says_why(got.body)
        if path in ("/suite/v1/role", "/suite/v1/state") and KEY.encode() not in auth and got.status < 400:
            assert any(name.lower() == b"authorization" and KEY.encode() in value for name, value in headers)
    assert (role.role, role.phase, role.epoch) == ("any", "serving", 0)
    assert not complaints(log)


@examples(60)
@given(drawn=REQUEST)
async def test_whatever_is_asked_of_the_control_routes(server: Server, log: Log, drawn: Any) -> None:
    await _requests(server, log, drawn)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@examples(3000)
@given(drawn=REQUEST)
async def test_whatever_is_asked_many_times(server: Server, log: Log, drawn: Any) -> None:
    await _requests(server, log, drawn)


async def test_the_control_routes_are_there(server: Server) -> None:
    """What the fuzz would not notice: that nothing is served at all."""
    head = b"GET /suite/v1/role HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer control-key\r\n\r\n"
    got = await exchange(server.url, [head], DEADLINE_S)
    assert (got.status, json.loads(got.body)["role"]) == (200, "any")
    document = {"role": "decode", "epoch": json.loads(got.body)["epoch"], "role_epoch": 0}
    sent = sendable("POST", "/suite/v1/role", [(b"Authorization", b"Bearer control-key")], _framed(encoded(document)))
    answer = await exchange(server.url, [sent], DEADLINE_S)
    assert (answer.status, json.loads(answer.body)["reason"]) == (409, "fixed")


async def test_what_vllm_leaves_open_needs_its_key(locked: Server, server: Server) -> None:
    """`/invocations` generates; vLLM asks for its key under `/v1` and a few more alone."""

    async def status(at: Server, method: str, path: str, key: bytes = b"") -> int | None:
        headers = [(b"Authorization", b"Bearer " + key)] if key else []
        return (await exchange(at.url, [sendable(method, path, headers, _framed(b"{}"))], DEADLINE_S)).status

    posts = ["/invocations", "/tokenize", "/detokenize", "/v1/completions", "/nowhere", "//invocations", "/metrics"]
    for path in posts:
        for key in (b"", b"control-key", b"engine-keys", b"\xff"):
            assert await status(locked, "POST", path, key) == 401, (path, key)
        for key in (b"engine-key", b"other-key"):
            assert await status(locked, "POST", path, key) not in (401, None), (path, key)
        assert await status(server, "POST", path) != 401, path
    for path in ("/health", "/metrics", "/ping", "/version"):
        assert await status(locked, "GET", path) != 401, path
    assert await status(locked, "POST", "/ping") != 401
    # The control routes keep their own.
    assert await status(locked, "POST", "/suite/v1/role", b"engine-key") == 401
    assert await status(locked, "POST", "/suite/v1/role", b"control-key") == 400


async def test_a_deep_body_is_malformed(server: Server) -> None:
    """Found by the fuzz: it went beyond Python's recursion limit and became a 500."""
    sent = sendable("POST", "/suite/v1/role", [(b"Authorization", b"Bearer control-key")], _framed(b"[" * 4000))
    answer = await exchange(server.url, [sent], DEADLINE_S)
    assert (answer.status, json.loads(answer.body)["reason"]) == (400, "malformed")


def _framed(body: bytes) -> tuple[bytes, bytes, bool]:
    return b"Content-Length: %d\r\n" % len(body), body, True


# `MINE` stands for the instance's own epoch, without which a body gets no further than `stale`.
MINE = "<the instance's>"
_OWN_SWITCH = st.fixed_dictionaries(
    {"role": _ROLE, "epoch": st.just(MINE), "role_epoch": st.integers(-1, 3)},
    optional={"give_back": st.booleans() | ANY_JSON},
)


@examples(200)
@given(status=st.sampled_from([200, 202, 409]), body=_OWN_SWITCH | _SWITCH | ANY_JSON)
@example(status=202, body={"role": "any", "epoch": MINE, "role_epoch": 3})
@example(status=202, body={"role": "decode", "epoch": MINE, "role_epoch": 0, "give_back": True})
def test_whatever_is_asked_of_a_switcher(status: int, body: Any) -> None:
    """The part behind the route, with a switcher that would begin."""
    from vllm_suite.compat.role_routes import RoleRoutes
    from vllm_suite.identity import identity

    begun: list[tuple[str, int, bool]] = []

    def begin(role: str, epoch: int, give_back: bool) -> None:
        begun.append((role, epoch, give_back))
        if status != 202:
            raise Refused("noop" if status == 200 else "stale", "as drawn")

    routes = RoleRoutes()
    routes.switcher = SimpleNamespace(begin=begin, can=("any",), last=None)  # type: ignore[assignment]
    if isinstance(body, dict) and body.get("epoch") == MINE:
        body = body | {"epoch": identity().epoch}
    answered, answer = routes.set(body)
    assert answered in (200, 202, 400, 409)
    assert answer["outcome"] in ("begun", "noop", "refused")
    assert answered == 202 or answer["error"]
    assert (answered == 202) == (bool(begun) and status == 202)
    for role, epoch, give_back in begun:
        assert role in ("encode", "prefill", "decode", "any")
        assert type(epoch) is int
        assert give_back is body.get("give_back", False)


@examples(200)
@given(
    state=st.dictionaries(
        st.sampled_from(["instance_id", "epoch", "role", "phase", "role_epoch", "load", "can"]), ANY_JSON
    )
)
def test_whatever_an_instance_says_of_its_role(state: dict[str, Any]) -> None:
    found = read("http://x", state)
    assert found is None or (found.queue >= 0 and isinstance(found.instance_id, str))
