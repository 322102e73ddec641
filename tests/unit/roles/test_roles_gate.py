"""The door of an instance, by ASGI messages: what is work, and a refusal that waits for no client for ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from vllm_suite.roles import gate
from vllm_suite.roles.gate import Door, Gate
from vllm_suite.roles.state import Deadlines, RoleState, begin


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def ask(path: str, receive: Any, method: str = "POST") -> list[dict[str, Any]]:
    """What a door that closes answers."""
    door = Door(begin(RoleState("any"), "prefill", 0, 0.0, Deadlines()))
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": []}
    async with asyncio.timeout(5):
        await Gate(app, door)(scope, receive, send)
    return sent


async def whole() -> dict[str, Any]:
    return {"type": "http.request", "body": b"{}", "more_body": False}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/completions", 503),
        ("POST", "/pooling", 503),
        ("GET", "/v1/models", 200),
        ("POST", "/tokenize", 200),
        # Of an answer that is drained; to refuse it would make the drain longer.
        ("POST", "/v1/responses/resp_1/cancel", 200),
        ("POST", "/v1/responses", 503),
    ],
)
async def test_what_a_closing_door_lets_in(method: str, path: str, status: int) -> None:
    assert (await ask(path, whole, method))[0]["status"] == status


async def test_a_body_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_BODY_S", 0.05)

    async def silent() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    start, body = await ask("/v1/completions", silent)
    assert start["status"] == 503
    assert "send it to another" in json.loads(body["body"])["error"]["message"]
