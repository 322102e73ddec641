"""What a watch reads: Prometheus as its documentation has it, with its failures, and recorded windows."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from watched import stretch

from vllm_suite.planner.watch import (
    Histogram,
    Prometheus,
    Recorded,
    WatchError,
)


class Fake:
    """A server that answers as the documentation of Prometheus' HTTP API has it."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, str]], Any] = self.matrix
        self.values: dict[str, list[tuple[dict[str, str], list[str]]]] = {
            "vllm:request_success_total": [({}, ["30", "60"])],
            "vllm:request_prompt_tokens_sum": [({}, ["9000", "18000"])],
            "vllm:request_generation_tokens_sum": [({}, ["600", "NaN"])],
            "vllm:request_prompt_tokens_bucket": [
                # Out of order, as a hash table gives them.
                ({"le": "+Inf"}, ["30", "60"]), ({"le": "100"}, ["10", "15"]), ({"le": "1000.0"}, ["29", "60"]),
            ],
            "vllm:request_generation_tokens_bucket": [({"le": "50"}, ["30", "40"]), ({"le": "+Inf"}, ["30", "60"])],
        }  # fmt: skip

    def matrix(self, asked: dict[str, str]) -> Any:
        name = max((name for name in self.values if name + "{" in asked["query"]), key=len)
        first, step = float(asked["start"]), float(asked["step"])
        rows = [
            {"metric": metric, "values": [[first + index * step, value] for index, value in enumerate(values)]}
            for metric, values in self.values[name]
        ]
        return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": rows}})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = {key: str(value) for key, value in (await request.post()).items()}
        self.asked.append(asked)
        answer = self.answer(asked)
        found: web.StreamResponse = await answer if asyncio.iscoroutine(answer) else answer
        return found


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    ready, box = threading.Event(), dict[str, Any]()

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/api/v1/query_range", fake.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        assert site._server is not None
        box["port"] = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        ready.set()
        await box["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield f"http://127.0.0.1:{box['port']}"
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(20)


def test_windows_are_what_prometheus_answers() -> None:
    fake = Fake()
    with served(fake) as url:
        found = Prometheus(url + "/", selector='job="decode"', step=30, lag=5).windows(1000.0, 1066.0)
    one, two = found
    assert (one.start, one.seconds, one.requests, one.rate) == (1000.0, 30.0, 30.0, 1.0)
    assert one.prompts == Histogram((100.0, 1000.0, math.inf), (10.0, 19.0, 1.0), 9000.0)
    assert one.outputs == Histogram((50.0, math.inf), (30.0, 0.0), 600.0)
    assert two.prompts.counts == (15.0, 45.0, 0.0)
    # What Prometheus has no number for counts as nothing.
    assert two.outputs.total == 0.0
    queries = {asked["query"] for asked in fake.asked}
    assert 'sum (increase(vllm:request_success_total{job="decode"}[30000ms]))' in queries
    assert 'sum by (le) (increase(vllm:request_prompt_tokens_bucket{job="decode"}[30000ms]))' in queries
    assert {(asked["start"], asked["end"], asked["step"]) for asked in fake.asked} == {("1030.000", "1060.000", "30")}


def test_no_whole_window_asks_nothing() -> None:
    assert Prometheus("http://127.0.0.1:1").windows(1000.0, 1060.0) == []


async def _slow() -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


def _empty(asked: dict[str, str]) -> web.Response:
    return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": []}})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda asked: web.json_response({"status": "error", "errorType": "bad_data", "error": "parse error"},
                                         status=400), "HTTP 400, bad_data: parse error"),
        (lambda asked: web.json_response({"status": "error", "errorType": "timeout", "error": "query timed out"},
                                         status=503), "HTTP 503, timeout"),
        (lambda asked: web.Response(text="<html>no", status=502), "HTTP 502 and no JSON"),
        (lambda asked: web.json_response([1]), "no success"),
        (lambda asked: web.json_response({"status": "success", "data": {"resultType": "vector", "result": []}}),
         "a matrix is expected"),
        (lambda asked: web.json_response({"status": "success", "data": {"resultType": "matrix", "result": [{}]}}),
         "no series of numbers"),
        (_empty, "no series vllm:request_success_total"),
        (lambda asked: _slow(), "no answer within 0.3 s"),
    ],
    ids=["400", "503", "html", "list", "vector", "row", "absent", "slow"],
)  # fmt: skip
def test_error_answers_say_what_is_wrong(answer: Any, reason: str) -> None:
    fake = Fake()
    fake.answer = answer
    with served(fake) as url, pytest.raises(WatchError, match=reason):
        Prometheus(url, step=30, timeout=0.3 if reason.startswith("no answer") else 20.0).windows(0.0, 90.0)


def test_nobody_there_is_an_error_that_keeps_the_password() -> None:
    for url in ("http://user:secret@127.0.0.1:1", "http://user:secret@:1", "http://user:a@secret@127.0.0.1:1/x@y"):
        with pytest.raises(WatchError, match="query_range") as caught:
            Prometheus(url, timeout=5).windows(0.0, 200.0)
        assert "secret" not in str(caught.value)


def test_a_window_without_samples_is_left_out() -> None:
    fake = Fake()
    fake.values["vllm:request_success_total"] = [({}, ["30"])]
    with served(fake) as url:
        (found,) = Prometheus(url, step=30, lag=5).windows(1000.0, 1066.0)
    assert found.start == 1000.0


def test_recordings_come_back_and_bad_ones_say_why(tmp_path: Path) -> None:
    draw = np.random.default_rng(15)
    windows = [stretch(draw, 60.0 * index) for index in range(3)]
    file = Recorded(tmp_path / "w.json")
    file.write(windows)
    assert file.windows() == windows
    assert file.windows(60.0, 130.0) == windows[1:2]
    good = json.loads(file.path.read_text())
    for text, reason in (
        ("{", "w.json"),
        ('{"windows": []}', "no list"),
        (json.dumps({"windows": [good["windows"][0], {"start": 1}]}), "window 1: no 'seconds'"),
        (json.dumps({"windows": [good["windows"][0] | {"prompts": {"bounds": [2, 1], "counts": [1, 1], "total": 3}}]}),
         "window 0: .*ascending"),
        (json.dumps({"windows": [good["windows"][0] | {"seconds": 0}]}), "0 seconds"),
    ):  # fmt: skip
        file.path.write_text(text)
        with pytest.raises(WatchError, match=reason):
            file.windows()
    other = replace(windows[0].prompts, bounds=(1.0, 2.0, 3.0, 4.0, 5.0))
    with pytest.raises(WatchError, match="different buckets"):
        Histogram.joined([windows[0].prompts, other])
