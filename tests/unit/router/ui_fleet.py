"""A document of a fleet, and a server of the page that shows it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from aiohttp import web
from pydantic import SecretStr

from vllm_suite.router.auth import Keys
from vllm_suite.router.config import Auth
from vllm_suite.router.members import Pool as RouterPool
from vllm_suite.router.metrics import Live as RouterLive
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.ui import document as doc
from vllm_suite.router.ui.routes import LiveRoutes

NOW = 1_790_000_000.0


def member(role: str, index: int, **over: object) -> doc.Member:
    base = doc.Member(
        instance=f"llm-{role}-{index}",
        epoch=f"{index:02d}a4c1e9",
        role=role,
        role_epoch=0,
        phase="serving",
        target=None,
        ready=True,
        why_not="",
        running=2 + index % 5,
        waiting=index % 3,
        kv_usage=((index * 37 + 11) % 100) / 100,
        in_router=3 + index % 4,
    )
    return msgspec.structs.replace(base, **over)


def pool(role: str, members: list[doc.Member], missing: int = 0) -> doc.Pool:
    return doc.Pool(
        role=role,
        instances=len(members),
        ready=sum(one.ready for one in members),
        missing=missing,
        running=sum(one.running or 0 for one in members),
        waiting=sum(one.waiting or 0 for one in members),
        in_router=sum(one.in_router for one in members),
        members=members,
        left_out=0,
    )


def document(encoders: int = 2, prefills: int = 2, decodes: int = 3, **over: object) -> doc.Live:
    """A fleet that has something of everything."""
    prefill = [member("prefill", index) for index in range(prefills)]
    decode = [member("decode", index) for index in range(decodes)]
    decode[-1] = member("decode", decodes - 1, ready=False, phase="closing", target="prefill", role_epoch=3)
    prefill[-1] = member("prefill", prefills - 1, ready=False, why_not="does not answer", running=None, kv_usage=None)
    pairs = [
        doc.Pair("kv", source.instance, target.instance, 3.1e6 * (1 + i + j), 1.5 + j, 8.4e9, 1204.0)
        for i, source in enumerate(prefill)
        for j, target in enumerate(decode)
    ][: doc.MAX_PAIRS]
    base = doc.Live(
        version=doc.VERSION,
        time=NOW,
        suite="0.1.0",
        started=NOW - 86_400,
        window_s=300.0,
        health="degraded",
        headline="1 of 2 prefill not ready; 1 of 3 decode not ready",
        draining=False,
        traffic=doc.Traffic(
            in_flight=17,
            requests_per_s=12.34,
            failed=2,
            refused=5,
            disaggregated=0.875,
            recoveries=9,
            goodput=0.958,
            step_s=5.0,
            rate_series=[12 + 4 * math.sin(i / 6) for i in range(60)],
            ttft_p99_series=[None if i < 5 else 400 + 90 * math.cos(i / 4) for i in range(60)],
        ),
        pools=[
            pool("encode", [member("encode", index) for index in range(encoders)]),
            pool("prefill", prefill, missing=1),
            pool("decode", decode),
        ],
        transfers=doc.Transfers(
            kv_bytes_per_s=55.8e6, ec_bytes_per_s=1.2e6, kv_pulls_per_s=10.7, pairs=pairs, left_out=0
        ),
        latency=doc.Latency(
            seen=[
                doc.Spread("ttft", 182.0, 431.0, 3702),
                doc.Spread("tpot", 21.4, 38.9, 3698),
                doc.Spread("request", 2210.0, 7840.0, 3698),
            ],
            stages=[
                doc.Spread("encode", 31.0, 88.0, 410),
                doc.Spread("queue", 4.0, 61.0, 3702),
                doc.Spread("prefill", 96.0, 214.0, 3239),
                doc.Spread("first_token", 38.0, 97.0, 3702),
                doc.Spread("decode", 1980.0, 7100.0, 3698),
            ],
        ),
        targets=[doc.Target("ttft", 300.0, 0.961), doc.Target("tpot", 40.0, 0.993)],
        plan=doc.Plan(
            10.0,
            12.34,
            [
                doc.PlanRow("ttft p50", 170.0, 150.0, 200.0, 182.0, "inside"),
                doc.PlanRow("ttft p99", 320.0, 280.0, 380.0, 431.0, "slower"),
                doc.PlanRow("tpot p50", 25.0, 23.0, 28.0, 21.4, "quicker"),
                doc.PlanRow("tpot p99", 40.0, 34.0, 47.0, None, "unknown"),
            ],
        ),
        events=[
            doc.Event("recovery", "decode_retry", "disconnect", "llm-decode-1", "a1b2c3d4e5f6", NOW - 40, NOW - 12, 7),
            doc.Event("membership", "unreachable", "", "llm-prefill-1", "", NOW - 13, NOW - 13, 1),
            doc.Event("recovery", "error", "no_instance", "", "0f1e2d3c4b5a", NOW - 90, NOW - 90, 2),
            doc.Event("membership", "switched", "", "llm-decode-0", "", NOW - 200, NOW - 200, 1),
        ],
    )
    return msgspec.structs.replace(base, **over)


class Fixed:
    """Stands where `LiveState` does and answers with what it is given."""

    def __init__(self, answer: doc.Live) -> None:
        self.answer = answer
        self.asked = 0

    def document(self) -> doc.Live:
        self.asked += 1
        return self.answer


@dataclass
class Shown:
    """A running server of the page."""

    url: str
    state: Fixed
    runner: web.AppRunner

    async def stop(self) -> None:
        await self.runner.cleanup()


@asynccontextmanager
async def showing(answer: doc.Live, key: str | None = None, port: int = 0) -> AsyncIterator[Shown]:
    """The page in front of a document, behind a key where one is given."""
    state = Fixed(answer)
    keys = Keys.resolve(Auth(api_keys=(SecretStr(key),) if key else ()), {})
    app = web.Application()
    LiveRoutes(state, keys, RouterMetrics(RouterPool(), RouterLive(0, 4.0))).add(app)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
    host, number = runner.addresses[0][:2]
    try:
        yield Shown(f"http://{host}:{number}", state, runner)
    finally:
        await runner.cleanup()
