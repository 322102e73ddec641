"""Replay, comparison and report, against a scripted server."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.fleet.compare import mismatches, quantile, times
from vllm_suite.fleet.prompts import Prompt
from vllm_suite.fleet.replay import Answer, Settings, replay
from vllm_suite.fleet.report import Moved, make_report, print_report
from vllm_suite.fleet.scrape import parse

Serve = Callable[[Callable[[web.Request], Awaitable[web.StreamResponse]]], Awaitable[str]]
SETTINGS = Settings(model="m", max_tokens=3, chat_every=2)


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Starts a server with one handler for both endpoints; gives its address."""
    runners: list[web.AppRunner] = []

    async def begin(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> str:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    yield begin
    for runner in runners:
        await runner.cleanup()


def chunk(tokens: list[int], **more: object) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": tokens, **more}]}).encode() + b"\n\n"


def prompts(count: int) -> list[Prompt]:
    return [Prompt(i, 0.01 * i, (10 + i, 11, 12, 13, 14)) for i in range(count)]


async def stream(request: web.Request, parts: list[bytes], pause_s: float = 0.0) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    for part in parts:
        await response.write(part)
        await asyncio.sleep(pause_s)
    return response


async def test_what_is_sent_and_what_is_measured(serve: Serve) -> None:
    bodies: list[tuple[str, dict[str, Any], str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append((request.path, body, request.headers.get("Authorization")))
        parts = [b": comment\n\n", chunk([], prompt_token_ids=[1, 2]), chunk([5]), chunk([6, 7]), b"data: [DONE]\n\n"]
        return await stream(request, parts, 0.02)

    answers = await replay(await serve(handler), prompts(2), SETTINGS, key="k")
    assert [answer.token_ids for answer in answers] == [(5, 6, 7), (5, 6, 7)]
    assert [answer.prompt_tokens for answer in answers] == [2, 2]
    for answer in answers:
        assert answer.error is None
        assert answer.ttft_ms is not None
        assert answer.ttft_ms >= 35
        assert answer.tpot_ms is not None
        # Two tokens came one pause after the first.
        assert 9 <= answer.tpot_ms < answer.ttft_ms
    (path, body, key), (chat_path, chat, _) = sorted(bodies, key=lambda item: item[0], reverse=True)
    assert path == "/v1/completions"
    assert body["prompt"] == [10, 11, 12, 13, 14]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (3, 0, True)
    assert key == "Bearer k"
    assert chat_path == "/v1/chat/completions"
    assert chat["max_completion_tokens"] == 3
    assert chat["messages"][0]["content"]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([chunk([5]), b"data: [DONE]\n\n"], "ended after 1 of 3 tokens"),
        ([chunk([5, 6, 7])], "without [DONE]"),
        ([chunk([5]), b'data: {"error": {"message": "boom"}}\n\n'], "boom"),
        ([b"data: {nonsense\n\n"], "ValueError"),
    ],
)
async def test_a_broken_answer_is_an_error(serve: Serve, parts: list[bytes], says: str) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, parts)

    (answer,) = await replay(await serve(handler), prompts(1), SETTINGS)
    assert says.lower().replace("valueerror", "") in str(answer.error).lower()
    assert answer.error


async def test_an_http_error_and_no_server_are_errors(serve: Serve) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": "busy"}, status=503)

    (answer,) = await replay(await serve(handler), prompts(1), SETTINGS)
    assert "HTTP 503" in str(answer.error)
    (answer,) = await replay("http://127.0.0.1:9", prompts(1), SETTINGS)
    assert "ClientConnectorError" in str(answer.error)


async def test_requests_go_out_at_their_time_and_overlap(serve: Serve) -> None:
    running = most = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.2)
        running -= 1
        return await stream(request, [chunk([5, 6, 7]), b"data: [DONE]\n\n"])

    await replay(await serve(handler), prompts(5), SETTINGS)
    assert most == 5


def answer(index: int, tokens: tuple[int, ...] = (1, 2, 3), error: str | None = None, prompt: int = 4) -> Answer:
    return Answer(index, prompt, tokens, 10.0 + index, 1.0, error)


def test_mismatches() -> None:
    want = [answer(i) for i in range(5)]
    got = [answer(0), answer(1, (1, 9, 3)), answer(2, (1, 2)), answer(3, error="HTTP 500"), answer(4, prompt=5)]
    found = mismatches(got, want)
    assert [(m["index"], m["position"]) for m in found] == [(1, 1), (2, 2), (3, 3), (4, 3)]
    assert mismatches(want, want) == []
    with pytest.raises(ValueError, match="is compared with"):
        mismatches([answer(0)], [answer(1)])


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_quantile_is_the_smallest_that_covers(values: list[float], q: float) -> None:
    found = quantile(values, q)
    assert found in values
    covered = sum(value <= found for value in values) / len(values)
    assert covered >= q - 1e-6
    below = [value for value in values if value < found]
    assert len(below) / len(values) < q + 1e-6


def test_quantile_of_known_values() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile(values, 1.0)) == (50, 99, 100)
    assert quantile([], 0.5) is None


def test_times_leave_failed_requests_out() -> None:
    result = times([answer(0), answer(10), answer(90, error="x")])
    assert result["ttft_ms"] == {"p50": 10.0, "p99": 20.0, "mean": 15.0}
    assert times([])["tpot_ms"] == {"p50": None, "p99": None, "mean": None}


FACTS: dict[str, Any] = {"trace": {"name": "t"}}


@pytest.mark.parametrize(
    ("got", "moved", "ok"),
    [
        ([answer(0), answer(1)], Moved(kv_bytes=8, transfers=2), True),
        ([answer(0), answer(1)], Moved(kv_bytes=0, transfers=0), False),
        ([answer(0), answer(1)], Moved(kv_bytes=0, transfers=2), False),
        ([answer(0), answer(1, (1, 2, 4))], Moved(kv_bytes=8, transfers=2), False),
        ([answer(0), answer(1, error="x")], Moved(kv_bytes=8, transfers=2), False),
        ([], Moved(kv_bytes=8, transfers=2), False),
    ],
)
def test_the_report_is_ok_only_for_what_the_demo_claims(got: list[Answer], moved: Moved, ok: bool) -> None:
    report = make_report(got, [answer(a.index) for a in got], moved, FACTS)
    assert report["ok"] is ok
    assert report["identical"] + report["mismatched"] == report["requests"] == len(got)
    out = io.StringIO()
    print_report(report, out)
    assert f"{report['identical']} of {report['requests']}" in out.getvalue()
    assert "none: the model takes no pictures" in out.getvalue()
    json.dumps(report)


@pytest.mark.parametrize(
    ("got", "local", "ok"),
    [
        ([answer(0), answer(1), answer(2)], 3, True),
        ([answer(0), answer(1), answer(2)], 2, False),
        ([answer(0), answer(1), answer(2)], 4, False),
        ([answer(0), answer(1), answer(2, (1, 2, 4))], 3, False),
    ],
)
def test_every_picture_counts(got: list[Answer], local: int, ok: bool) -> None:
    moved = Moved(kv_bytes=8, transfers=3, pictures={"local": local})
    report = make_report(got, [answer(a.index) for a in got], moved, FACTS, {1: 1, 2: 2})
    assert report["ok"] is ok
    right = 2 - report["mismatched"]
    assert report["pictures"] == {
        "requests": 2, "pictures": 3, "identical": right, "prompt_tokens": 8, "encoded_at_prefill": local,
    }  # fmt: skip
    out = io.StringIO()
    print_report(report, out)
    assert "1 requests of" in out.getvalue()
    assert f"{local} of 3" in out.getvalue()


METRICS = """# TYPE vllm:nixl_bytes_transferred histogram
vllm:nixl_bytes_transferred_bucket{engine="0",le="+Inf"} 2
vllm:nixl_bytes_transferred_sum{engine="0"} 1000
vllm:nixl_bytes_transferred_count{engine="0"} 2
# TYPE vllm:nixl_xfer_time_seconds histogram
vllm:nixl_xfer_time_seconds_bucket{engine="0",le="+Inf"} 2
vllm:nixl_xfer_time_seconds_sum{engine="0"} 0.5
vllm:nixl_xfer_time_seconds_count{engine="0"} 2
# TYPE vllm_suite_kv_recomputes_total counter
vllm_suite_kv_recomputes_total{engine="0",reason="expired"} 3
vllm_suite_kv_recomputes_total{engine="0",reason="refused"} 0
"""


def test_what_moved_is_a_difference_of_two_scrapes() -> None:
    before = Moved.read([parse(METRICS)], parse(""))
    later = (
        METRICS.replace("1000", "1500")
        .replace('expired"} 3', 'expired"} 4')
        .replace('_count{engine="0"} 2', '_count{engine="0"} 3')
    )
    moved = Moved.read([parse(later)], parse("")).since(before)
    assert (moved.kv_bytes, moved.transfers, moved.recomputes) == (500, 1, {"expired": 1})
    assert before.recomputes == {"expired": 3}


def test_samples_by_label_and_total() -> None:
    samples = parse(METRICS)
    assert samples.total("vllm_suite_kv_recomputes_total") == 3
    assert samples.total("vllm_suite_kv_recomputes_total", reason="refused") == 0
    assert samples.total("absent") == 0
