"""The bodies of all requests together: bounded, and given back on every way out."""

from __future__ import annotations

import asyncio
import json

import pytest

from vllm_suite.router.config import RouterConfig

MB = 1_000_000
LIMITS = {"body_bytes": 1_100_000, "total_body_bytes": 2_500_000, "retry_after_s": 7}


def large(**fields):
    return json.dumps({"model": "tiny", "prompt": "x" * MB, "max_tokens": 3, **fields}).encode()


async def pieces(raw):
    """Chunked: of unknown length."""
    for start in range(0, len(raw), 50_000):
        yield raw[start : start + 50_000]


def post(router, raw, *, chunked=False):
    data = pieces(raw) if chunked else raw
    return router.client.post(router.url + "/v1/completions", data=data, headers={"Content-Type": "application/json"})


async def status_of(router, raw, **how):
    async with post(router, raw, **how) as response:
        await response.read()
        return response.status


async def empty(router):
    await router.until(lambda: router.value("requests_in_flight") == router.value("body_bytes") == 0, timeout_s=10)


async def connect(router, head):
    reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rsplit(":", 1)[1]))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
    return reader, writer


@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_beyond_the_total_are_refused_until_others_have_ended(instance, serve, chunked):
    d = await instance("any", hold=asyncio.Event())
    router = await serve([d], limits=LIMITS, slo={"ttft": "60s"})
    running = [asyncio.create_task(status_of(router, large(), chunked=chunked)) for _ in range(2)]
    await router.until(lambda: len(d.seen) == 2, timeout_s=10)
    assert 2 * MB < router.value("body_bytes") < 2.1 * MB
    async with post(router, large(), chunked=chunked) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "7")
        assert "leave no room" in (await response.json())["error"]["message"]
    # What came in of it is given back, and a small one still fits.
    await router.until(lambda: router.value("requests_in_flight") == 2)
    assert router.value("body_bytes") < 2.1 * MB
    small = asyncio.create_task(status_of(router, large(prompt="x")))
    await router.until(lambda: len(d.seen) == 3)
    # A client leaves: another one has its room.
    running.pop().cancel()
    await router.until(lambda: router.value("body_bytes") < 1.1 * MB)
    running.append(asyncio.create_task(status_of(router, large(), chunked=chunked)))
    await router.until(lambda: len(d.seen) == 4, timeout_s=10)
    d.hold.set()
    assert await asyncio.gather(small, *running) == [200, 200, 200]
    await empty(router)
    assert [await status_of(router, large(), chunked=chunked) for _ in range(4)] == [200] * 4
    assert router.value("rejected_total", reason="total_body_bytes") == 1
    assert router.value("requests_total", endpoint="completions", code="429") == 1
    assert router.value("slo_requests_total", model="other", verdict="failed") == 1


async def test_an_answer_that_has_begun_holds_no_body(instance, serve):
    d = await instance("any")
    router = await serve([d], limits=LIMITS)
    d.script.extend(["wait"] * 4)
    streams = [await post(router, large(stream=True)) for _ in range(4)]
    assert [one.status for one in streams] == [200] * 4
    assert (router.value("requests_in_flight"), router.value("body_bytes")) == (4, 0)
    d.go_on.set()
    assert all([(await one.read()).endswith(b"data: [DONE]\n\n") for one in streams])
    await empty(router)


async def test_an_announced_length_keeps_nobody_out(instance, serve):
    """Clients that say a length and send nothing hold nothing."""
    d = await instance("any")
    router = await serve([d], limits=LIMITS)
    idle = [await connect(router, b"Content-Length: 1000000\r\n") for _ in range(5)]
    await router.until(lambda: router.value("requests_in_flight") == 5)
    assert await status_of(router, large()) == 200
    for _, writer in idle:
        writer.close()
    await empty(router)
    assert router.value("rejected_total", reason="total_body_bytes") == 0


async def test_every_end_gives_the_room_back(instance, serve):
    d = await instance("any")
    router = await serve([d], limits=LIMITS, timeouts={"client_s": 1.5}, recovery={"decode_retries": 0})
    d.script.extend(["500", "reset", "400"])
    for expected in (500, 502, 400):
        assert await status_of(router, large()) == expected
    assert await status_of(router, b"{" + large(), chunked=True) == 400  # no JSON
    assert await status_of(router, large(prompt="x" * 1_200_000), chunked=True) == 413
    reader, writer = await connect(router, b"Content-Length: 1000000\r\n")
    writer.write(b"x" * 500_000)  # and no more
    await router.until(lambda: router.value("body_bytes") == 500_000, timeout_s=10)
    assert (await asyncio.wait_for(reader.readline(), 10)).startswith(b"HTTP/1.1 408")
    writer.close()
    _, writer = await connect(router, b"Transfer-Encoding: chunked\r\n")
    writer.write(b"7a120\r\n" + b"x" * 500_000)
    await router.until(lambda: router.value("body_bytes") == 500_000, timeout_s=10)
    writer.close()
    await empty(router)
    assert router.value("rejected_total", reason="total_body_bytes") == 0


def test_the_total_has_room_for_one() -> None:
    with pytest.raises(ValueError, match=r"total_body_bytes \(5\) is less than limits.body_bytes \(9\)"):
        RouterConfig.model_validate({"limits": {"body_bytes": 9, "total_body_bytes": 5}})
