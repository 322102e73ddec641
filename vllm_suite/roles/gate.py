"""The door of an instance: counts the requests inside by what they want, and refuses what its role does not do now.

An ASGI middleware around vLLM's API server. The router says in a header which stage a request is for; a request without
it is taken by any instance that serves, and by none that is about to switch. A refusal is a 503 with ``X-Suite-Refused:
role``: nothing of the request was begun, so whoever sent it may send it elsewhere at once. A request of the router that
is inside and not begun can get the same answer later.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import secrets
from collections import Counter
from collections.abc import Collection
from typing import get_args

from vllm_suite.roles.state import RoleState, Stage, serves
from vllm_suite.roles.visit import App, Receive, Scope, Send, Visit

_log = logging.getLogger("vllm.suite.roles")

STAGE_HEADER = "X-Suite-Stage"
REFUSED_HEADER = "X-Suite-Refused"
REFUSED = "role"
PROBE_HEADER = "X-Suite-Probe"

_STAGE, _PROBE, _NAME = STAGE_HEADER.lower().encode(), PROBE_HEADER.lower().encode(), b"x-request-id"
_STAGES: dict[bytes, Stage] = {stage.encode(): stage for stage in get_args(Stage)}
_PREFIXES = ("/v1/", "/v2/", "/inference/")
_PATHS = ("/generate", "/invocations", "/pooling", "/classify", "/score", "/rerank")
# Administration, and work of the front end alone.
_FREE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_LONGEST_BODY = 1 << 30
_BODY_S = 30.0


class Door:
    """What the gate and the switch of one process share.

    Attributes:
        state: of the instance.
        arrived: requests let in since the start, by stage.
        inside: requests between their arrival and the end of their answer, by stage; `unknown` where they did not say.
        refused: requests refused since the start.
        visits: those inside that say their stage and have a name.
        probe_key: opens the gate for requests of the switch itself, which count for nothing.
    """

    def __init__(self, state: RoleState) -> None:
        self.state = state
        self.inside: dict[str, int] = {"encode": 0, "prefill": 0, "decode": 0, "unknown": 0}
        self.arrived = dict(self.inside)
        self.refused = 0
        self.probe_key = secrets.token_hex(16)
        self.visits: set[Visit] = set()

    @property
    def running(self) -> int:
        """All that is inside."""
        return sum(self.inside.values())

    def open_names(self) -> set[str]:
        """Names of the requests inside that could go back; one that two of them have tells neither.

        One of role `any` encodes for others where no encoder is ready; whether another would, only the router knows.
        """
        names = Counter(visit.name for visit in self.visits)
        stays = "encode" if self.state.role == "any" else None
        return {one.name for one in self.visits if one.open and names[one.name] == 1 and one.stage != stays}

    def give_back(self, names: Collection[str]) -> Counter[str]:
        """Answer these with a refusal, where nothing of an answer has left; how many were, by stage."""
        names = self.open_names().intersection(names)
        return Counter(visit.stage for visit in list(self.visits) if visit.name in names and visit.give_back())

    def is_probe(self, given: bytes) -> bool:
        """Whether a header's value is the key of the switch."""
        return hmac.compare_digest(given, self.probe_key.encode())

    def takes(self, stage: Stage | None, probe: bool) -> bool:
        """Whether a request may come in now; a probe sees the role that is being verified, and
        before that the old one."""
        if not probe:
            return self.state.accepts(stage)
        if stage is None:
            return True
        verifying = self.state.phase in ("switching", "verified") and self.state.target is not None
        role = self.state.target if verifying else self.state.role
        assert role is not None
        return serves(role, stage)


class Gate:
    """The middleware; `door` is shared with the control routes."""

    def __init__(self, app: App, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not _is_work(scope):
            await self._app(scope, receive, send)
            return
        stage, probe, request_name = _wanted(scope, self._door)
        door = self._door
        if not door.takes(stage, probe):
            door.refused += not probe
            if await _read_all(receive, send):
                await _refuse(door.state, send)
            return
        if probe:
            await self._app(scope, receive, send)
            return
        name = stage or "unknown"
        door.inside[name] += 1
        door.arrived[name] += 1
        try:
            if stage is not None and request_name:
                await self._visited(Visit(request_name, stage, receive, send), scope, send)
            else:
                await self._app(scope, receive, send)
        finally:
            door.inside[name] -= 1

    async def _visited(self, visit: Visit, scope: Scope, send: Send) -> None:
        door = self._door
        door.visits.add(visit)
        try:
            await self._app(scope, visit.receive, visit.send)
        except Exception:
            if not visit.given_back:
                raise
            # It was told that its client has left. Whatever it makes of that, the request goes elsewhere.
            _log.warning("vllm-suite: a request that was given back ended with an error", exc_info=True)
        finally:
            door.visits.discard(visit)
        if visit.given_back:
            await _refuse(door.state, send)


def _is_work(scope: Scope) -> bool:
    if scope["type"] == "websocket":
        return True
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    # To cancel an answer is no work either, and makes the drain shorter.
    free = path in _FREE or (path.startswith("/v1/responses/") and path.endswith("/cancel"))
    return not free and path.startswith((*_PREFIXES, *_PATHS))


def _wanted(scope: Scope, door: Door) -> tuple[Stage | None, bool, str]:
    stage: Stage | None = None
    probe, request_name = False, ""
    for name, value in scope["headers"]:
        if name == _STAGE:
            stage = _STAGES.get(value)
        elif name == _PROBE:
            probe = door.is_probe(value)
        elif name == _NAME:
            request_name = value.decode("latin-1")
    return stage, probe, request_name


async def _read_all(receive: Receive, send: Send) -> bool:
    """Take what the client is still sending: an answer amid it could cost the connection. False: it wants none."""
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BODY_S):
            while taken < _LONGEST_BODY:
                message = await receive()
                if message["type"] in ("http.disconnect", "websocket.disconnect"):
                    return False
                if message["type"] == "websocket.connect":
                    await send({"type": "websocket.close", "code": 1013, "reason": "the instance is changing its role"})
                    return False
                taken += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
    return True


async def _refuse(state: RoleState, send: Send) -> None:
    doing = f"serves as {state.role}" if state.phase == "serving" else f"is {state.phase}"
    text = f"this instance {doing} and does not take the request; send it to another"
    error = {"message": text, "type": "ServiceUnavailableError", "param": None, "code": 503}
    body = json.dumps({"error": error}).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "retry-after": "1",
        REFUSED_HEADER.lower(): REFUSED,
    }
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 503, "headers": raw})
    await send({"type": "http.response.body", "body": body})
