"""Errors beside vLLM's own: routes and handlers of the installed vLLM, asked directly and through the router."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from scripted import DEAD, free_port

from vllm_suite.router.errors import error_bytes
from vllm_suite.router.upstream import failed_answer

JSON = {"Content-Type": "application/json"}
LONG = list(range(100))


@pytest.fixture(scope="module")
def vllm_app():
    """vLLM's completion and chat routes with its error handlers, without an engine behind them."""
    pytest.importorskip("vllm")
    from fastapi import FastAPI
    from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
    from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completion
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.openai_serving_completion = None
    app.state.openai_serving_chat = None
    init_exception_handler(app)
    attach_completion(app)
    attach_chat(app)
    return app


@pytest.fixture
async def vllm_server(vllm_app):
    import uvicorn

    port = free_port()

    @vllm_app.get("/suite/v1/state")
    async def state():
        return {"instance_id": "v", "epoch": "e", "role": "any", "ready": True, "models": ["tiny"]}

    server = uvicorn.Server(uvicorn.Config(vllm_app, host="127.0.0.1", port=port, log_level="error"))
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(20):
        while not server.started:
            await asyncio.sleep(0.02)
    yield SimpleNamespace(url=f"http://127.0.0.1:{port}", role="any")
    server.should_exit = True
    await task


BAD = [
    b"",
    b"{",
    b"nonsense",
    b"[1]",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"prompt": {}}',
    b'{"prompt": [1, "x"]}',
    json.dumps({"prompt": LONG, "max_tokens": "many"}).encode(),
    json.dumps({"prompt": LONG, "temperature": []}).encode(),
    json.dumps({"prompt": LONG, "n": "two"}).encode(),
    json.dumps({"prompt": LONG, "stream": "perhaps"}).encode(),
    json.dumps({"prompt": LONG, "stream_options": {"include_usage": True}}).encode(),
    json.dumps({"prompt": LONG, "logprobs": -3}).encode(),
    json.dumps({"messages": "x"}).encode(),
    json.dumps({"messages": [{"content": "word " * 200}], "top_logprobs": 3}).encode(),
]


async def ask(client, url, path, raw, headers):
    async with client.post(url + path, data=raw, headers=headers) as response:
        return response.status, response.content_type, await response.read()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_refusals_are_vllms_own(instance, serve, vllm_server, path):
    """Also with a prefill instance in front that takes whatever it gets."""
    p = await instance("prefill")
    router = await serve([vllm_server])
    split = await serve([vllm_server, p])
    for raw in BAD:
        for headers in (JSON, {"Content-Type": "text/plain"}):
            direct = await ask(router.client, vllm_server.url, path, raw, headers)
            assert await ask(router.client, router.url, path, raw, headers) == direct
            assert await ask(router.client, split.url, path, raw, headers) == direct
    assert direct[0] == 400
    assert p.seen


def test_own_errors_have_vllms_shape(vllm_app):
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    theirs = create_error_response("m", "ServiceUnavailableError", HTTPStatus.SERVICE_UNAVAILABLE)
    assert json.loads(error_bytes(503, "m")) == theirs.model_dump()
    assert list(json.loads(error_bytes(503, "m"))["error"]) == list(theirs.model_dump()["error"])


def test_an_ended_engine_is_told_apart(vllm_app):
    """By vLLM's own words for it, and no other server error of its."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    def kind(error):
        body = create_error_response(error)
        return failed_answer(body.error.code, body.model_dump_json().encode(), "decode").kind

    assert str(EngineDeadError()) == DEAD
    assert kind(EngineDeadError()) == "engine_dead"
    assert kind(EngineGenerateError("x")) == "status"
    assert kind(RuntimeError(f"not {DEAD}")) == "status"


async def test_unauthorized_is_vllms(instance, serve):
    pytest.importorskip("vllm")
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def never(scope, receive, send):
        raise AssertionError

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "root_path": ""}
    await AuthenticationMiddleware(never, ["k"])(scope, receive, send)
    router = await serve([await instance("any")], auth={"api_keys": ["k"]})
    async with router.client.get(router.url + "/v1/models") as response:
        assert response.status == sent[0]["status"]
        assert await response.read() == sent[1]["body"]
        assert response.headers["Content-Type"].encode() == dict(sent[0]["headers"])[b"content-type"]
