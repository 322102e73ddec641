"""Router CPU per request: ours, `vllm-router` (Rust, PyPI) and a FastAPI + httpx proxy, in one run.

The instance behind them is a scripted HTTP server, the client keeps 8 requests in flight, and what counts is the
CPU time (user and system, all threads) that the proxy's process spent, so other load on the machine matters little.
Each proxy serves each shape in several rounds, turn about; the table shows the median round. The SSE target is held
against the stream whose chunks go out at once; with a pause after each chunk, every chunk costs a wake-up and two
system calls in any proxy, and that shape is measured beside it.

    python benchmarks/bench_router.py [--vllm-router-bin PATH] [--json FILE]

Exit status 1 when a target is missed: JSON at most 0.25 ms, SSE at most 1.2 times the Rust router. Where the Rust
router is missing, its row and the SSE target say `not measured`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

JSON_TARGET_MS = 0.25
SSE_TARGET_RATIO = 1.2
CHUNKS = 32
START_DEADLINE_S = 60.0
CLOCK_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
SHAPES = ("json", "sse", "sse_spaced")
PATH = "/v1/completions"


def request_body(stream: bool, gap_ms: float) -> dict[str, Any]:
    """A short completion; `user` tells the scripted instance how far apart its chunks go out."""
    return {
        "model": "bench",
        "prompt": "The quick brown fox jumps over the lazy dog. " * 4,
        "max_tokens": CHUNKS,
        "temperature": 0,
        "stream": stream,
        "user": str(gap_ms),
    }


# The scripted instance


async def serve_instance(port: int) -> None:
    """Answers a small JSON body or 32 events, at once or spaced."""
    from aiohttp import web

    choice = {"index": 0, "text": " word", "logprobs": None, "finish_reason": None, "stop_reason": None}
    event = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1, "model": "bench"}
    chunk = b"data: " + json.dumps({**event, "choices": [choice]}).encode() + b"\n\n"
    whole = json.dumps({**event, "choices": [{**choice, "text": " word" * CHUNKS}], "usage": {"prompt_tokens": 40}})
    epoch = os.urandom(8).hex()

    async def completions(request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        if not body.get("stream"):
            return web.Response(body=whole.encode(), content_type="application/json")
        gap_s = float(body["user"]) / 1e3
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for _ in range(CHUNKS):
            await response.write(chunk)
            await asyncio.sleep(gap_s)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def health(request: web.Request) -> web.Response:
        return web.Response()

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "bench", "object": "model"}]})

    async def state(request: web.Request) -> web.Response:
        return web.json_response(
            {"instance_id": "bench", "epoch": epoch, "role": "any", "ready": True, "models": ["bench"]}
        )

    app = web.Application()
    app.router.add_post(PATH, completions)
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/suite/v1/state", state)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=512).start()
    await asyncio.Event().wait()


# The proxy that examples show


def serve_fastapi(port: int, target: str) -> None:
    """FastAPI, uvicorn and httpx in the shape of vLLM's own toy proxy."""
    import httpx
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, StreamingResponse

    app = FastAPI()
    client = httpx.AsyncClient(timeout=None, base_url=target, limits=httpx.Limits(max_connections=None))

    # FastAPI reads the annotation at run time.
    async def completions(request):  # type: ignore[no-untyped-def]
        body = await request.json()
        headers = {"X-Request-Id": os.urandom(16).hex()}
        if not body.get("stream"):
            answer = await client.post(PATH, json=body, headers=headers)
            return JSONResponse(answer.json(), status_code=answer.status_code)

        async def pieces():  # type: ignore[no-untyped-def]
            async with client.stream("POST", PATH, json=body, headers=headers) as answer:
                async for piece in answer.aiter_bytes():
                    yield piece

        return StreamingResponse(pieces(), media_type="text/event-stream")

    completions.__annotations__["request"] = Request
    app.post(PATH)(completions)

    @app.get("/health")
    async def health() -> dict[str, bool]:
        return {"ok": True}

    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", log_level="error", access_log=False)


# Processes


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its live descendants."""
    total = 0.0
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        fields = text[text.rindex(")") + 2 :].split()
        total = (int(fields[11]) + int(fields[12])) * CLOCK_TICK_S
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += cpu_seconds(int(child))
    except (FileNotFoundError, ProcessLookupError):
        return total
    return total


class Process:
    """A server of this benchmark in a process group of its own, with its output in a file."""

    def __init__(self, name: str, argv: list[str], port: int, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._log = folder / f"{name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
        self.pid = self._process.pid

    async def ready(self) -> None:
        """Wait until one completion succeeds. Raises RuntimeError with the end of the log."""
        import aiohttp

        end = time.monotonic() + START_DEADLINE_S
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end and self._process.poll() is None:
                try:
                    async with session.post(self.url + PATH, json=request_body(False, 0)) as response:
                        if response.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
        raise RuntimeError(f"no answer from {self.url}\n{self._log.read_text(errors='replace')[-2000:]}")

    def stop(self) -> None:
        """End the process group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.pid, number)
                self._process.wait(timeout=5)
                return
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


async def load(url: str, shape: str, requests: int, in_flight: int, gap_ms: float) -> float:
    """Send the requests and check every answer. Returns the wall time in seconds."""
    import aiohttp

    stream = shape != "json"
    body = json.dumps(request_body(stream, gap_ms if shape == "sse_spaced" else 0.0)).encode()
    left = requests

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal left
        while left > 0:
            left -= 1
            async with session.post(url + PATH, data=body, headers={"Content-Type": "application/json"}) as response:
                raw = await response.read()
                if response.status != 200 or (stream and raw.count(b"data: ") != CHUNKS + 1):
                    raise RuntimeError(f"wrong answer {response.status}: {raw[:300]!r}")

    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(worker(session) for _ in range(in_flight)))
    return time.perf_counter() - began


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All proxies, all shapes, turn about."""
    here = [sys.executable, __file__]
    instance_port, ports = free_port(), {}
    instance = Process("instance", [*here, "--serve", "instance", "--port", str(instance_port)], instance_port, folder)
    rust = args.vllm_router_bin or shutil.which("vllm-router")
    argv: dict[str, list[str]] = {}

    def add(name: str, command: list[str]) -> None:
        ports[name] = free_port()
        argv[name] = [word.replace("PORT", str(ports[name])) for word in command]

    suite = [sys.executable, "-m", "vllm_suite.cli.main", "router", "--port", "PORT", "--any", instance.url]
    add("vllm-suite", suite)
    if rust:
        command = [rust, "--host", "127.0.0.1", "--port", "PORT", "--worker-urls", instance.url]
        command += ["--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "error"]
        add("vllm-router", command)
    add("fastapi+httpx", [*here, "--serve", "fastapi", "--port", "PORT", "--target", instance.url])

    rows: dict[str, dict[str, Any]] = {}
    processes: dict[str, Process] = {}
    try:
        await instance.ready()
        for name, words in argv.items():
            processes[name] = Process(name.replace("+", "-"), words, ports[name], folder)
        for process in processes.values():
            await process.ready()
            for shape in SHAPES:
                await load(process.url, shape, 10 * args.in_flight, args.in_flight, args.gap_ms)
        samples: dict[tuple[str, str], list[float]] = {(name, shape): [] for name in processes for shape in SHAPES}
        walls: dict[tuple[str, str], list[float]] = {key: [] for key in samples}
        for _ in range(args.rounds):
            for shape in SHAPES:
                requests = args.requests if shape == "json" else max(args.requests // 4, 1)
                for name, process in processes.items():
                    before = cpu_seconds(process.pid)
                    wall_s = await load(process.url, shape, requests, args.in_flight, args.gap_ms)
                    used_s = cpu_seconds(process.pid) - before
                    samples[name, shape].append(1e3 * used_s / requests)
                    walls[name, shape].append(1e3 * wall_s / requests)
        for name in processes:
            rows[name] = {
                shape: {
                    "cpu_ms": statistics.median(samples[name, shape]),
                    "cpu_ms_rounds": samples[name, shape],
                    "wall_ms": statistics.median(walls[name, shape]),
                }
                for shape in SHAPES
            }
    finally:
        for process in (*processes.values(), instance):
            process.stop()
    if not rust:
        rows["vllm-router"] = dict.fromkeys(SHAPES)
    return rows


def verdict(rows: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    """Which targets hold; None where a peer was not measured."""
    ours, rust = rows["vllm-suite"], rows["vllm-router"]
    held: dict[str, bool | None] = {"json_cpu_ms_at_most_0.25": ours["json"]["cpu_ms"] <= JSON_TARGET_MS}
    peer = rust["sse"]
    ratio_held = None if peer is None else ours["sse"]["cpu_ms"] <= SSE_TARGET_RATIO * peer["cpu_ms"]
    held["sse_at_most_1.2_of_vllm_router"] = ratio_held
    return held


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Ours over the Rust router's, per shape."""
    ours, rust = rows["vllm-suite"], rows["vllm-router"]
    return {shape: rust[shape] and ours[shape]["cpu_ms"] / rust[shape]["cpu_ms"] for shape in SHAPES}


def show(rows: dict[str, dict[str, Any]], held: dict[str, bool | None], args: argparse.Namespace) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"proxy CPU per request, ms ({args.in_flight} in flight, median of {args.rounds} rounds)")
    table.add_column("proxy")
    for title in ("JSON", f"SSE {CHUNKS} chunks at once", f"SSE {CHUNKS} chunks, {args.gap_ms:g} ms apart"):
        table.add_column(title, justify="right")
    for name, row in rows.items():
        cells = ["not measured" if row[shape] is None else f"{row[shape]['cpu_ms']:.3f}" for shape in SHAPES]
        table.add_row(name, *cells)
    console = Console()
    console.print(table)
    for shape, ratio in ratios(rows).items():
        if ratio is not None:
            console.print(f"{shape}: {ratio:.2f} times vllm-router")
    for name, value in held.items():
        console.print(f"{name}: {'not measured' if value is None else 'yes' if value else 'NO'}")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000, help="JSON requests a round; a quarter of it for SSE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", type=int, default=8)
    parser.add_argument("--gap-ms", type=float, default=2.0, help="time between the chunks of a spaced stream")
    parser.add_argument("--vllm-router-bin", metavar="PATH", help="default: vllm-router on PATH")
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    parser.add_argument("--serve", choices=("instance", "fastapi"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.vllm_router_bin and not Path(args.vllm_router_bin).is_file():
        parser.error(f"--vllm-router-bin: no such file: {args.vllm_router_bin}")

    import uvloop

    if args.serve == "instance":
        uvloop.run(serve_instance(args.port))
        return 0
    if args.serve == "fastapi":
        serve_fastapi(args.port, args.target)
        return 0

    from vllm_suite.provenance import provenance

    with tempfile.TemporaryDirectory(prefix="bench-router-") as folder:
        rows = uvloop.run(measure(args, Path(folder)))
    held = verdict(rows)
    show(rows, held, args)
    if args.json:
        result = {
            "benchmark": "router",
            "unit": "ms",
            "rows": rows,
            "ratio_to_vllm_router": ratios(rows),
            "targets": held,
            "provenance": provenance(),
        }
        result["settings"] = {"requests": args.requests, "rounds": args.rounds, "in_flight": args.in_flight}
        result["settings"] |= {"chunks": CHUNKS, "gap_ms": args.gap_ms}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    return 1 if False in held.values() else 0


if __name__ == "__main__":
    sys.exit(main())
