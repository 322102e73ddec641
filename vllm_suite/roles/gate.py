"""The door of an instance: counts the requests inside by what they want, and refuses what its role does not do now.

An ASGI middleware around vLLM's API server. The router says in a header which stage a request is for; a request without
it is taken by any instance that serves, and by none that is about to switch. A refusal is a 503 with ``X-Suite-Refused:
role``: nothing of the request was begun, so whoever sent it may send it elsewhere at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, get_args

from vllm_suite.roles.state import RoleState, Stage, serves

STAGE_HEADER = "X-Suite-Stage"
REFUSED_HEADER = "X-Suite-Refused"
REFUSED = "role"
PROBE_HEADER = "X-Suite-Probe"

_STAGE, _PROBE = STAGE_HEADER.lower().encode(), PROBE_HEADER.lower().encode()
_STAGES: dict[bytes, Stage] = {stage.encode(): stage for stage in get_args(Stage)}
_PREFIXES = ("/v1/", "/v2/", "/inference/")
_PATHS = ("/generate", "/invocations", "/pooling", "/classify", "/score", "/rerank")
# Administration, and work of the front end alone.
_FREE = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_LONGEST_BODY = 1 << 30
_BODY_S = 30.0

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Door:
    """What the gate and the switch of one process share.

    Attributes:
        state: of the instance.
        arrived: requests let in since the start, by stage.
        inside: requests between their arrival and the end of their answer, by stage; `unknown` where they did not say.
        refused: requests refused since the start.
        probe_key: opens the gate for requests of the switch itself, which count for nothing.
    """

    def __init__(self, state: RoleState) -> None:
        self.state = state
        self.inside: dict[str, int] = {"encode": 0, "prefill": 0, "decode": 0, "unknown": 0}
        self.arrived = dict(self.inside)
        self.refused = 0
        self.probe_key = secrets.token_hex(16)

    @property
    def running(self) -> int:
        """All that is inside."""
        return sum(self.inside.values())

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
        stage, probe = _wanted(scope, self._door)
        door = self._door
        if not door.takes(stage, probe):
            door.refused += not probe
            await _refuse(door.state, receive, send)
            return
        if probe:
            await self._app(scope, receive, send)
            return
        name = stage or "unknown"
        door.inside[name] += 1
        door.arrived[name] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            door.inside[name] -= 1


def _is_work(scope: Scope) -> bool:
    if scope["type"] == "websocket":
        return True
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    # To cancel an answer is no work either, and makes the drain shorter.
    free = path in _FREE or (path.startswith("/v1/responses/") and path.endswith("/cancel"))
    return not free and path.startswith((*_PREFIXES, *_PATHS))


def _wanted(scope: Scope, door: Door) -> tuple[Stage | None, bool]:
    stage: Stage | None = None
    probe = False
    for name, value in scope["headers"]:
        if name == _STAGE:
            stage = _STAGES.get(value)
        elif name == _PROBE:
            probe = door.is_probe(value)
    return stage, probe


async def _refuse(state: RoleState, receive: Receive, send: Send) -> None:
    # What the client is still sending is taken first: an answer amid it could cost the connection.
    taken = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BODY_S):
            while taken < _LONGEST_BODY:
                message = await receive()
                if message["type"] in ("http.disconnect", "websocket.disconnect"):
                    return
                if message["type"] == "websocket.connect":
                    await send({"type": "websocket.close", "code": 1013, "reason": "the instance is changing its role"})
                    return
                taken += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
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
