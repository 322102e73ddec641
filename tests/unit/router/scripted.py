"""A scripted instance: a real HTTP server on loopback that answers as told, faults included."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.roles.gate import REFUSED, REFUSED_HEADER

REFERENCE = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "engine",
    "remote_host": "127.0.0.1",
    "remote_port": 1,
    "suite": {"epoch": "e", "digest": "0.10"},
}

LONG = list(range(100))


def body(**over: Any) -> dict[str, Any]:
    """A completion whose prompt is long enough for prefill."""
    return {"model": "tiny", "prompt": LONG, "max_tokens": 5, **over}


# What vLLM's EngineDeadError says, with type InternalServerError and code 500.
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."


@dataclass
class Seen:
    """One request as it arrived."""

    path: str
    headers: CIMultiDict[str]
    raw: bytes
    body: Any
    aborted: bool = False


def free_port() -> int:
    """Not one that the system hands out: tests run side by side, and another one could be given it meanwhile."""
    return free_ports(1)


@dataclass
class Instance:
    """`script` holds what the next requests get, one word each; `ok` when it is empty.

    ok · a status code · hang · slow (0.4 s before the first byte) · role_error (a stream that begins with
    the role and then a server error) · reset (connection closed unanswered) ·
    die (closed after two events) · die_first (closed after the head) · die_json (closed inside a JSON body) ·
    stall (silent after two events) · wait (silent after two events until `go_on` is set) ·
    error_event (a stream that begins with a server error) · dead (500 of an engine that has ended) ·
    dead_event, dead_late (a stream that begins with it, or ends with it after two events) ·
    trickle (an event each 50 ms) · garbage (200 with a body that is no JSON) · no_reference ·
    refused (503 of an instance whose role does not do that work)
    """

    role: str = "any"
    instance_id: str = ""
    epoch: str = "e1"
    ready: bool = True
    draining: bool = False
    models: list[str] = field(default_factory=lambda: ["tiny"])
    port: int = 0
    state_key: str | None = None
    state_mode: str = "ok"  # ok · hang · 500 · junk · deep
    script: deque[str] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    events: int = 4
    load: dict[str, Any] = field(default_factory=lambda: {"running": 0, "waiting": 0})
    prompt_tokens: int = 100
    completion_tokens: int = 1
    finish_reason: str = "length"
    usage_event: bool = False  # streams end with their usage, each of the last events in a piece of its own
    hold: asyncio.Event | None = None  # no request is answered before it is set
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    ec: dict[str, Any] | None = None  # what the EPD plugin adds to the state
    says: dict[str, Any] = field(default_factory=dict)  # further keys of the state

    async def start(self) -> Instance:
        self.port = self.port or free_port()
        self.instance_id = self.instance_id or f"{self.role}-{self.port}"
        app = web.Application(client_max_size=1 << 28)
        app.router.add_get("/suite/v1/state", self._state)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/v1/chat/completions", self._generate)
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        return self

    async def stop(self) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _state(self, request: web.Request) -> web.Response:
        if self.state_key and request.headers.get("Authorization") != f"Bearer {self.state_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.state_mode == "hang":
            await asyncio.sleep(30)
        if self.state_mode == "500":
            return web.Response(status=500)
        if self.state_mode == "junk":
            return web.json_response({"instance_id": 3})
        if self.state_mode == "deep":
            return web.Response(body=b"[" * 200_000 + b"]" * 200_000, content_type="application/json")
        return web.json_response(
            {
                "instance_id": self.instance_id,
                "epoch": self.epoch,
                "role": self.role,
                "ready": self.ready,
                "draining": self.draining,
                "models": self.models,
                "max_model_len": 1024,
                "vllm": "0.32.0+cpu",
                "load": self.load,
                **({"ec": self.ec} if self.ec else {}),
                **self.says,
            }
        )

    async def _health(self, request: web.Request) -> web.Response:
        if self.state_mode == "hang":
            await asyncio.sleep(30)
        return web.Response(status=200 if self.ready else 503)

    async def _models(self, request: web.Request) -> web.Response:
        cards = [{"id": name, "object": "model", "created": 1} for name in self.models]
        return web.json_response({"object": "list", "data": cards})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        seen = Seen(request.path, CIMultiDict(request.headers), raw, body)
        self.seen.append(seen)
        try:
            if self.hold is not None:
                await self.hold.wait()
            return await self._answer(request, body, self.script.popleft() if self.script else "ok")
        except asyncio.CancelledError:
            seen.aborted = True
            raise

    async def _answer(self, request: web.Request, body: Any, word: str) -> web.StreamResponse:
        if not isinstance(body, dict):
            return _error(400, "not a JSON object")
        if word.isdigit():
            return _error(int(word), f"scripted {word}")
        if word == "dead":
            return _error(500, DEAD)
        if word == "refused":
            return web.json_response({"error": {}}, status=503, headers={REFUSED_HEADER: REFUSED})
        if word == "hang":
            await asyncio.sleep(30)
        if word == "slow":
            await asyncio.sleep(0.4)
        transport = request.transport
        assert transport is not None
        if word == "reset":
            transport.close()
            return web.Response()
        if word == "garbage":
            return web.Response(body=b"<html>", content_type="application/json")
        params = body.get("kv_transfer_params") or {}
        if body.get("stream"):
            return await self._stream(request, word)
        answer = {
            "id": request.headers.get("X-Request-Id"),
            "model": body.get("model"),
            "choices": [{"index": 0, "text": self.instance_id, "finish_reason": self.finish_reason}],
            "usage": {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens},
            "kv_transfer_params": REFERENCE if params.get("do_remote_decode") and word != "no_reference" else None,
        }
        if word == "die_json":
            text = json.dumps(answer).encode()
            response = web.StreamResponse(
                headers={"Content-Length": str(len(text)), "Content-Type": "application/json"}
            )
            await response.prepare(request)
            await response.write(text[:20])
            transport.close()
            return response
        return web.json_response(answer)

    async def _stream(self, request: web.Request, word: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        transport = request.transport
        assert transport is not None
        await response.prepare(request)
        if word == "die_first":
            transport.close()
            return response
        if word == "role_error":
            role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
            await response.write(b"data: " + json.dumps(role).encode() + b"\n\n")
            await asyncio.sleep(0.05)
        if word in ("error_event", "role_error", "dead_event"):
            return await _end_with_error(response, DEAD if word == "dead_event" else "KV load failed")
        for index in range(self.events):
            choice = {"index": 0, "text": f"{index} {self.instance_id}", "finish_reason": None}
            if index == self.events - 1:
                choice["finish_reason"] = self.finish_reason
            event = {"choices": [choice]}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.05 if word == "trickle" else 0)
            if index == 1 and word == "dead_late":
                return await _end_with_error(response, DEAD)
            if index == 1 and word == "wait":
                await self.go_on.wait()
            if index == 1 and word in ("die", "stall"):
                await asyncio.sleep(0.05 if word == "die" else 30)
                transport.abort()
                return response
        if self.usage_event:
            await asyncio.sleep(0.02)
            usage = {"choices": [], "usage": {"completion_tokens": self.completion_tokens}}
            await response.write(b"data: " + json.dumps(usage).encode() + b"\n\n")
            await asyncio.sleep(0.02)
        await response.write(b"data: [DONE]\n\n")
        return response


async def _end_with_error(response: web.StreamResponse, message: str) -> web.StreamResponse:
    """As vLLM ends a stream that has failed: an error event, and [DONE] all the same."""
    event = {"error": {"message": message, "type": "InternalServerError", "param": None, "code": 500}}
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


def _error(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "Scripted", "param": None, "code": status}}
    return web.json_response(body, status=status)
