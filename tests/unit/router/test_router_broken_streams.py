"""Answers that break off amid a stream, and clients that leave."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from scripted import body


async def test_total_timeout_ends_a_lively_stream(instance, serve):
    d = await instance("decode", events=1000)
    router = await serve([d], timeouts={"total_s": 0.4, "idle_s": 0.2})
    d.script.append("trickle")
    status, raw = await router.post(body(stream=True))
    assert status == 200
    assert raw.count(b"data: ") > 5  # alive past the idle time, an event each 0.05 s
    assert b"[DONE]" not in raw
    assert router.value("stream_errors_total", reason="total") == 1


@pytest.mark.parametrize(("word", "reason", "code"), [("die", "disconnect", 502), ("stall", "idle", 504)])
async def test_decode_breaks_off_in_mid_stream(instance, serve, word, reason, code):
    """No retry after the first byte: an error event, no [DONE], and the connection closed."""
    one, two = await instance("decode"), await instance("decode")
    router = await serve([one, two], timeouts={"idle_s": 0.3})
    for d in (one, two):
        d.script.append(word)
    async with router.client.post(router.url + "/v1/completions", json=body(stream=True)) as response:
        raw = await response.read()
        assert response.status == 200
    events = [event for event in raw.split(b"\n\n") if event]
    assert len(events) == 3
    assert json.loads(events[-1].removeprefix(b"data: "))["error"]["code"] == code
    assert b"[DONE]" not in raw
    assert len(one.seen) + len(two.seen) == 1
    assert router.value("stream_errors_total", reason=reason) == 1
    if word == "stall":
        assert router.value("timeouts_total", stage="idle") == 1
        await router.until(lambda: any(seen.aborted for seen in one.seen + two.seen))


async def test_an_error_that_the_instance_itself_ends_a_stream_with(instance, serve):
    """It passes as it is, and counts as the answer that broke off that it is."""
    d = await instance("decode")
    router = await serve([d], slo={"ttft": "60s"})
    d.script.append("dead_late")
    status, raw = await router.post(body(stream=True))
    assert status == 200
    assert raw.count(b'data: {"error"') == 1
    assert raw.endswith(b"data: [DONE]\n\n")
    assert router.value("stream_errors_total", reason="engine_dead") == 1
    assert router.value("slo_requests_total", model="tiny", verdict="failed") == 1
    status, _ = await router.post(body(stream=True))
    assert status == 200
    assert router.value("slo_requests_total", model="tiny", verdict="good") == 1
    assert router.value("stream_errors_total", reason="engine_dead") == 1


async def test_broken_stream_closes_the_connection(instance, serve):
    d = await instance("decode")
    router = await serve([d])
    d.script.append("die")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(router.url.rsplit(":", 1)[1]))
    raw = json.dumps(body(stream=True)).encode()
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw))
    async with asyncio.timeout(3):
        answer = await reader.read()
    writer.close()
    assert answer.endswith(b"}}\n\n\r\n0\r\n\r\n")


async def test_half_a_long_answer_is_not_taken_for_a_whole_one(instance, serve):
    d = await instance("decode")
    router = await serve([d], limits={"buffered_answer_bytes": 10})
    d.script.append("die_json")
    with pytest.raises(aiohttp.ClientError):
        await router.post(body())
    assert router.value("stream_errors_total", reason="disconnect") == 1


async def leave(router, **kwargs):
    """A client that goes away after 0.15 s."""
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            await router.post(body(**kwargs))


async def test_client_leaves_during_prefill(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    p.script.append("hang")
    await leave(router)
    await router.until(lambda: p.seen[0].aborted)
    await asyncio.sleep(0.1)
    assert not d.seen
    assert router.value("client_disconnects_total", stage="prefill") == 1
    assert router.value("requests_total", endpoint="completions", code="499") == 1
    assert router.value("requests_in_flight") == 0
    assert all(m.outstanding_requests == 0 for m in router.router.pool.members)


@pytest.mark.parametrize(("word", "stage"), [("hang", "decode"), ("stall", "stream"), ("trickle", "stream")])
async def test_client_leaves_during_decode(instance, serve, word, stage):
    d = await instance("decode", events=1000)
    router = await serve([d])
    d.script.append(word)
    await leave(router, stream=True)
    await router.until(lambda: d.seen[0].aborted)
    await router.until(lambda: router.value("client_disconnects_total", stage=stage) == 1)
    assert router.value("requests_in_flight") == 0
    assert router.value("stream_errors_total", reason="disconnect") == 0
