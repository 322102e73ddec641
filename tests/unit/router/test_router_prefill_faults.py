"""A prefill instance fails: another one, or decode alone."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from scripted import LONG, REFERENCE, body


@pytest.mark.parametrize(
    ("word", "reason"),
    [("500", "status"), ("503", "status"), ("429", "status"), ("401", "auth"), ("reset", "disconnect"),
     ("garbage", "protocol"), ("die_json", "disconnect"), ("hang", "prefill")],
)  # fmt: skip
async def test_prefill_failure_goes_to_another_prefill(instance, serve, word, reason):
    first, second, d = await instance("prefill"), await instance("prefill"), await instance("decode")
    router = await serve([first, second, d], timeouts={"prefill_s": 0.3})
    first.script = second.script = deque([word])  # whichever comes first fails
    status, answer = await router.post(body())
    assert status == 200
    assert answer["choices"][0]["text"] == d.instance_id
    assert d.seen[0].body["kv_transfer_params"] == REFERENCE
    assert router.value("recoveries_total", step="prefill_retry", reason=reason) == 1
    if word == "hang":
        assert router.value("timeouts_total", stage="prefill") == 1
        await router.until(lambda: any(seen.aborted for seen in first.seen + second.seen))


async def test_prefill_exhausted_decode_computes_alone(instance, serve):
    ps = [await instance("prefill") for _ in range(3)]
    d = await instance("decode")
    router = await serve([*ps, d], recovery={"prefill_retries": 1})
    for p in ps:
        p.script.extend(["500"] * 5)
    status, _ = await router.post(body())
    assert status == 200
    assert sum(len(p.seen) for p in ps) == 2
    assert "kv_transfer_params" not in d.seen[0].body
    assert router.value("recoveries_total", step="decode_alone", reason="status") == 1


async def test_prefill_exhausted_error_when_asked_for(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d], recovery={"prefill_fallback": "error"})
    p.script.append("500")
    status, answer = await router.post(body())
    assert status == 502
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert not d.seen
    assert router.value("recoveries_total", step="error", reason="status") == 1


async def test_no_reference_is_counted(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    p.script.append("no_reference")
    status, _ = await router.post(body())
    assert status == 200
    assert "kv_transfer_params" not in d.seen[0].body
    assert router.value("recoveries_total", step="decode_alone", reason="no_reference") == 1


async def test_prefill_refusal_is_worded_by_decode(instance, serve):
    first, second, d = await instance("prefill"), await instance("prefill"), await instance("decode")
    router = await serve([first, second, d])
    for p in (first, second):
        p.script.append("400")
    d.script.append("400")
    status, answer = await router.post(body())
    assert status == 400
    assert answer["error"]["message"] == "scripted 400"
    assert len(first.seen) + len(second.seen) == 1
    assert d.seen[0].body == body()
    assert router.value("recoveries_total", step="prefill_rejected", reason="status") == 1


async def test_an_ended_prefill_engine_where_decode_may_not_compute(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d], recovery={"prefill_fallback": "error"})
    p.script.append("dead")
    async with router.client.post(router.url + "/v1/completions", json=body()) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "engine of the prefill instance has ended" in (await answer.json())["error"]["message"]
    assert not d.seen


async def test_a_prefill_that_never_answers_is_a_recovery(instance, serve):
    """As one that is stopped: it answers no poll either, and is forgotten before its request has run out of time."""
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d], timeouts={"prefill_s": 1.2})
    p.hold, p.state_mode = asyncio.Event(), "hang"
    status, _ = await router.post(body())
    assert status == 200
    assert router.value("membership_events_total", event="forgotten") == 1
    assert "kv_transfer_params" not in d.seen[0].body
    assert router.value("recoveries_total", step="decode_alone", reason="prefill") == 1
    assert router.value("upstream_errors_total", stage="prefill", kind="prefill") == 1
    assert router.value("timeouts_total", stage="prefill") == 1
    # Nobody asks it any more, so there is nothing to recover from.
    status, _ = await router.post(body(prompt=[7, *LONG]))
    assert status == 200
    assert router.value("decisions_total", path="direct", reason="no_prefill") == 1
    assert router.value("recoveries_total", step="decode_alone", reason="prefill") == 1
