"""What tracing costs: CPU time of a request through the router with tracing off, on, and on without sampling.

One process holds the client, the router, a scripted instance and, while tracing is on, an OTLP collector: the
difference between two rows is what counts. The rounds of the three take turns.

    python benchmarks/bench_tracing.py [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from common import arguments, show_table, write_result

from vllm_suite.router.app import ROUTER, create_app
from vllm_suite.router.config import RouterConfig

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "unit" / "router")]
BODY = {"model": "tiny", "prompt": "hi", "max_tokens": 2}


async def cpu_ms(settings: dict[str, Any], upstream: str, requests: int) -> float:
    """CPU milliseconds of a request, all of this process together."""
    app = create_app(RouterConfig.model_validate({"membership": {"static": [{"url": upstream}]}, **settings}))
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
    async with asyncio.timeout(30):
        while not app[ROUTER].pool.members:
            await asyncio.sleep(0.05)
    async with aiohttp.ClientSession() as client:

        async def some(count: int) -> None:
            for _ in range(count):
                async with client.post(url, json=BODY) as answer:
                    assert answer.status == 200
                    await answer.read()

        await some(requests // 3)
        began = time.process_time()
        await some(requests)
        spent = time.process_time() - began
    await runner.cleanup()
    return 1000 * spent / requests


async def measure(rounds: int, requests: int) -> dict[str, float]:
    """Medians over the rounds."""
    from otlp_collector import collecting
    from scripted import Instance

    instance = await Instance(role="any").start()
    try:
        async with collecting() as collector:
            tracing = {"endpoint": collector.url}
            cases: dict[str, dict[str, Any]] = {
                "off": {},
                "on": {"tracing": tracing},
                "on, sample 0": {"tracing": {**tracing, "sample": 0.0}},
            }
            found: dict[str, list[float]] = {name: [] for name in cases}
            for _ in range(rounds):
                for name, settings in cases.items():
                    found[name].append(await cpu_ms(settings, instance.url, requests))
                    instance.seen.clear()
    finally:
        await instance.stop()
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> int:
    """Print the table; 0."""
    args = arguments(__doc__ or "").parse_args()
    load = os.getloadavg()
    found = asyncio.run(measure(1, 30) if args.quick else measure(5, 300))
    rows = [[name, f"{ms:.3f}", f"{ms - found['off']:+.3f}"] for name, ms in found.items()]
    show_table("tracing, CPU ms of a request", ("tracing", "all together", "beside off"), rows)
    write_result(args.json, "tracing", {"cpu_ms": found}, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
