"""A router under test in front of scripted instances, everything on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import hypothesis
import pytest
from aiohttp import web
from encoders import Encoder
from scripted import Instance

from vllm_suite.router.app import ROUTER, Router, create_app
from vllm_suite.router.config import RouterConfig

# An example may take long on a machine that starts engines beside.
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")

FAST = {
    "membership": {"poll_interval_s": 0.05, "poll_timeout_s": 0.2, "forget_after_s": 0.5},
    "disaggregation": {"min_prompt_tokens": 8, "chunk_tokens": 8},
    "limits": {"wait_for_instance_s": 0.3},
}


class Served:
    """A running router and a client for it."""

    def __init__(self, router: Router, url: str, client: aiohttp.ClientSession, runner: web.AppRunner) -> None:
        self.router = router
        self.runner = runner
        self.url = url
        self.client = client

    async def post(self, body: Any, path: str = "/v1/completions", **kwargs: Any) -> tuple[int, Any]:
        kind = {"data": body} if isinstance(body, bytes) else {"json": body}
        if isinstance(body, bytes):
            kwargs.setdefault("headers", {})["Content-Type"] = "application/json"
        async with self.client.post(self.url + path, **kind, **kwargs) as response:
            raw = await response.read()
            return response.status, raw if response.content_type != "application/json" else await response.json()

    async def get(self, path: str, **kwargs: Any) -> tuple[int, Any]:
        async with self.client.get(self.url + path, **kwargs) as response:
            raw = await response.read()
            return response.status, await response.json() if response.content_type == "application/json" else raw

    def value(self, name: str, **labels: str) -> float:
        """A sample of the router's registry; 0 where there is none yet."""
        return self.router.metrics.registry.get_sample_value(f"vllm_suite_router_{name}", labels) or 0.0

    async def until(self, condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
        """Wait for a condition; fails the test when it does not come."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.01)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


StartRouter = Callable[..., Awaitable[Served]]
StartInstance = Callable[..., Awaitable[Instance]]


@pytest.fixture
async def instance() -> AsyncIterator[StartInstance]:
    started: list[Instance] = []

    async def start(role: str = "any", **kwargs: Any) -> Instance:
        made = await Instance(role=role, **kwargs).start()
        started.append(made)
        return made

    yield start
    for made in started:
        await made.stop()


@pytest.fixture
async def encoder() -> AsyncIterator[Callable[..., Awaitable[Encoder]]]:
    started: list[Encoder] = []

    async def start(role: str = "encode", **kwargs: Any) -> Encoder:
        made = Encoder(role=role, **kwargs)
        started.append(made)
        await made.start()
        return made

    yield start
    for made in started:
        await made.stop()


@pytest.fixture
async def serve() -> AsyncIterator[StartRouter]:
    closing: list[Callable[[], Awaitable[None]]] = []

    async def start(instances: list[Instance], ready: bool = True, **settings: Any) -> Served:
        static = [{"url": one.url, "role": one.role} for one in instances]
        config = RouterConfig.model_validate(merged(merged(FAST, {"membership": {"static": static}}), settings))
        app = create_app(config)
        runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=0.1,
            max_line_size=config.limits.header_bytes,
            max_field_size=config.limits.header_bytes,
        )
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        client = aiohttp.ClientSession()
        closing.extend([runner.cleanup, client.close])
        host, port = runner.addresses[0][:2]
        served = Served(app[ROUTER], f"http://{host}:{port}", client, runner)
        if ready:
            await served.until(lambda: sum(m.ready for m in served.router.pool.members) == len(instances))
        return served

    yield start
    for close in reversed(closing):
        await close()
