"""The way of a request through prefill and decode, and every way out of a failure."""

from __future__ import annotations

import asyncio
import json
from collections import deque

import aiohttp
import pytest
from scripted import REFERENCE

LONG = list(range(100))


def body(**over):
    return {"model": "tiny", "prompt": LONG, "max_tokens": 5, **over}


async def test_prefill_then_decode(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    status, answer = await router.post(
        body(stream=False, temperature=0, n=1, min_tokens=3), headers={"X-Request-Id": "abc-1"}
    )
    assert status == 200
    assert answer["choices"][0]["text"] == d.instance_id
    [to_p], [to_d] = p.seen, d.seen
    assert to_p.body["max_tokens"] == 1
    assert to_p.body["stream"] is False
    assert "min_tokens" not in to_p.body
    assert to_p.body["kv_transfer_params"]["do_remote_decode"] is True
    assert to_d.body == {**body(stream=False, temperature=0, n=1, min_tokens=3), "kv_transfer_params": REFERENCE}
    assert to_p.headers["X-Request-Id"] == to_d.headers["X-Request-Id"] == "abc-1"
    assert router.value("decisions_total", path="disaggregated", reason="prefill") == 1


async def test_stream_passes_through_unchanged(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    status, raw = await router.post(body(stream=True, stream_options={"include_usage": True}))
    assert status == 200
    assert raw.count(b"data: ") == 5
    assert raw.endswith(b"data: [DONE]\n\n")
    assert "stream_options" not in p.seen[0].body
    assert d.seen[0].body["stream_options"] == {"include_usage": True}


async def test_reference_passes_verbatim(instance, serve):
    """The reference is spliced in as bytes: a float such as 0.10 or a big number may not change."""
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    text = b'{ "prompt": ' + json.dumps(LONG).encode() + b', "model":"tiny", "temperature": 0.10 } \n'
    status, _ = await router.post(text)
    assert status == 200
    assert d.seen[0].raw.startswith(text.rstrip()[:-1].rstrip())
    assert d.seen[0].body["kv_transfer_params"] == REFERENCE


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        ({"prompt": [1, 2, 3]}, "short"),
        ({"prompt": [LONG, LONG]}, "batch"),
        ({"prompt": "a" * 10}, "short"),
        ({"n": 2}, "several_sequences"),
        ({"best_of": 3}, "several_sequences"),
        ({"use_beam_search": True}, "beam_search"),
        ({"prompt_logprobs": 0}, "prompt_output"),
        ({"echo": True}, "prompt_output"),
        ({"prompt_embeds": "x"}, "prompt_embeds"),
        ({"max_tokens": "many"}, "output_limit"),
        ({"max_tokens": 0}, "output_limit"),
        ({"prompt": 7}, "malformed"),
        ({"prompt": None}, "malformed"),
    ],
)
async def test_what_goes_straight_to_decode(instance, serve, over, reason):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    status, _ = await router.post(body(**over))
    assert status == 200
    assert not p.seen
    assert d.seen[0].body == body(**over)
    assert router.value("decisions_total", path="direct", reason=reason) == 1


async def test_single_entry_batch_and_chat_are_disaggregated(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    await router.post(body(prompt=[LONG]))
    chat = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "word " * 50}],
        "max_completion_tokens": 9,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
    }
    status, raw = await router.post(chat, path="/v1/chat/completions")
    assert status == 200
    assert raw.endswith(b"[DONE]\n\n")
    assert [seen.path for seen in p.seen] == ["/v1/completions", "/v1/chat/completions"]
    assert p.seen[1].body["max_tokens"] == p.seen[1].body["max_completion_tokens"] == 1
    assert "top_logprobs" not in p.seen[1].body
    assert d.seen[1].body["max_completion_tokens"] == 9
    assert router.value("decisions_total", path="disaggregated", reason="prefill") == 2


async def test_cached_prompt_goes_straight_to_decode(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    await router.post(body())
    await router.post(body(prompt=[*LONG, 7, 7, 7]))
    assert len(p.seen) == 1
    assert router.value("decisions_total", path="direct", reason="cached") == 1
    # Another salt shares no block with it.
    await router.post(body(cache_salt="other"))
    assert len(p.seen) == 2
    # A restart of decode empties what is remembered of it.
    d.epoch = "e2"
    await router.until(lambda: any(m.epoch == "e2" for m in router.router.pool.members))
    await router.post(body())
    assert len(p.seen) == 3


async def test_text_length_is_learned_from_prefill(instance, serve):
    p, d = await instance("prefill", prompt_tokens=100), await instance("decode")
    router = await serve([p, d])
    for index in range(60):
        await router.post(body(prompt=f"{index} " + "x" * 198))
    assert router.value("bytes_per_token") == pytest.approx(2.0, rel=0.15)


async def test_any_instances_are_balanced_not_disaggregated(instance, serve):
    one, two = await instance(), await instance()
    router = await serve([one, two])
    for _ in range(6):
        await router.post(body())
    assert (len(one.seen), len(two.seen)) == (3, 3)
    assert router.value("decisions_total", path="direct", reason="no_prefill") == 6


async def test_any_prefills_for_a_dedicated_decode(instance, serve):
    helper, d = await instance("any"), await instance("decode")
    router = await serve([helper, d], policies={"decode": "round_robin"})
    for _ in range(4):
        status, _ = await router.post(body(prompt=[len(helper.seen) + len(d.seen), *LONG]))
        assert status == 200
    assert any(seen.body.get("kv_transfer_params", {}).get("do_remote_decode") for seen in helper.seen)
    assert not any((seen.body.get("kv_transfer_params") or {}).get("do_remote_decode") for seen in d.seen)


async def test_versions_are_kept_apart_while_they_are_mixed(instance, serve):
    """An upgrade: each decode gets its prompts from prefill of its own version; one that has none does them itself."""
    old = {"vllm": "0.32.0", "kv": "a"}
    new = {"vllm": "0.33.0", "kv": "a"}
    p_old, d_old = await instance("prefill", says=old), await instance("decode", says=old)
    p_new, d_new = await instance("prefill", says=new), await instance("decode", says=new)
    router = await serve([p_old, d_old, p_new, d_new], policies={"decode": "round_robin"})
    for number in range(8):
        status, _ = await router.post(body(prompt=[number, *LONG]))
        assert status == 200
    for mine, theirs in ((p_old, d_old), (p_new, d_new)):
        assert len(mine.seen) == len(theirs.seen) == 4
        assert [one.body["prompt"] for one in mine.seen] == [one.body["prompt"] for one in theirs.seen]
    # Another layout is as bad, and a prefill that says nothing of itself is taken.
    p_old.says = {"vllm": "0.32.0", "kv": "b"}
    await router.until(lambda: any(m.state.versions.get("kv") == "b" for m in router.router.pool.members))
    for number in range(2):
        await router.post(body(prompt=[100 + number, *LONG]))
    assert router.value("decisions_total", path="direct", reason="other_version") == 1
    p_old.says = {"vllm": None, "kv": None}
    await router.until(lambda: any(m.state.versions.get("kv") is None for m in router.router.pool.members))
    before = len(p_old.seen)
    for number in range(4):
        await router.post(body(prompt=[200 + number, *LONG]))
    assert len(p_old.seen) > before


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


@pytest.mark.parametrize(
    ("word", "reason", "stream"),
    [("500", "status", False), ("503", "status", True), ("reset", "disconnect", False), ("reset", "disconnect", True),
     ("die_first", "disconnect", True), ("die_json", "disconnect", False), ("error_event", "status", True),
     ("hang", "first_byte", True), ("401", "auth", False)],
)  # fmt: skip
async def test_decode_failure_before_the_first_byte(instance, serve, word, reason, stream):
    """Another decode instance takes over, and without a reference that may have been used."""
    p, one, two = await instance("prefill"), await instance("decode"), await instance("decode")
    router = await serve([p, one, two], timeouts={"first_byte_s": 0.3})
    one.script = two.script = deque([word])
    status, answer = await router.post(body(stream=stream))
    assert status == 200
    failed, other = (one, two) if one.seen[0].body.get("kv_transfer_params") else (two, one)
    if stream:
        assert answer.count(b"data: ") == 5
        assert other.instance_id.encode() in answer
    assert failed.seen[0].body["kv_transfer_params"] == REFERENCE
    assert "kv_transfer_params" not in other.seen[0].body
    assert router.value("recoveries_total", step="decode_retry", reason=reason) == 1
    assert router.value("recoveries_total", step="reference_dropped", reason=reason) == 1
    assert all(m.outstanding_requests == m.outstanding_tokens == 0 for m in router.router.pool.members)


async def test_refused_connection_keeps_the_reference(instance, serve):
    """A request that was never sent has not used its reference."""
    p, one, two = await instance("prefill"), await instance("decode"), await instance("decode")
    router = await serve([p, one, two], membership={"poll_interval_s": 5, "poll_timeout_s": 1, "forget_after_s": 10})
    await one.stop()
    statuses = [(await router.post(body(prompt=[index, *LONG])))[0] for index in range(4)]
    assert statuses == [200] * 4
    assert all(seen.body["kv_transfer_params"] == REFERENCE for seen in two.seen)
    assert router.value("recoveries_total", step="decode_retry", reason="connect") == 1
    assert router.value("membership_events_total", event="suspect") == 1


async def test_decode_error_is_passed_on_when_nothing_else_helps(instance, serve):
    d = await instance("decode")
    router = await serve([d])
    d.script.extend(["500", "500"])
    status, answer = await router.post(body())
    assert status == 500
    assert answer["error"]["message"] == "scripted 500"
    assert len(d.seen) == 1
    assert router.value("recoveries_total", step="error", reason="status") == 1


@pytest.mark.parametrize(("word", "stream"), [("dead", False), ("dead", True), ("dead_event", True)])
async def test_an_engine_that_has_ended_is_no_error_of_the_client(instance, serve, word, stream):
    """Its 500 is a 503 where no other instance is left; another one takes the request where there is one."""
    first = await instance("decode")
    router = await serve([first], membership={"poll_interval_s": 5, "poll_timeout_s": 1, "forget_after_s": 10})
    first.ready = False  # what it says from now on
    first.script.append(word)
    headers = {"X-Request-Id": "dead-1"}
    async with router.client.post(router.url + "/v1/completions", json=body(stream=stream), headers=headers) as answer:
        said = (await answer.json())["error"]
        assert (answer.status, answer.headers["Retry-After"], answer.headers["X-Request-Id"]) == (503, "1", "dead-1")
    assert (said["code"], said["type"]) == (503, "ServiceUnavailableError")
    assert said["message"] == "the engine of the decode instance has ended and no other took the request"
    assert len(first.seen) == 1
    assert router.value("upstream_errors_total", stage="decode", kind="engine_dead") == 1
    assert router.value("recoveries_total", step="error", reason="engine_dead") == 1
    assert router.value("membership_events_total", event="suspect") == 1
    assert router.value("waits_total", outcome="gave_up") == 1


async def test_another_instance_takes_the_request_of_an_ended_engine(instance, serve):
    p, one, two = await instance("prefill"), await instance("decode"), await instance("decode")
    router = await serve([p, one, two])
    one.script = two.script = deque(["dead"])
    status, _ = await router.post(body())
    assert status == 200
    assert router.value("recoveries_total", step="decode_retry", reason="engine_dead") == 1
    assert router.value("recoveries_total", step="reference_dropped", reason="engine_dead") == 1
    # Prefill's engine has ended too: decode computes, or the client is told to come again.
    p.script.append("dead")
    status, _ = await router.post(body(prompt=[7, *LONG]))
    assert status == 200
    assert router.value("recoveries_total", step="decode_alone", reason="engine_dead") == 1


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


async def test_lone_decode_is_asked_again_after_a_lost_connection(instance, serve):
    """A kept-alive connection may close just when it is used; the instance itself is well."""
    d = await instance("decode")
    slow_polls = {"poll_interval_s": 5, "poll_timeout_s": 1, "forget_after_s": 10}  # the suspicion asks at once
    router = await serve([d], membership=slow_polls)
    d.script.append("reset")
    status, _ = await router.post(body())
    assert status == 200
    assert len(d.seen) == 2


async def test_decode_first_byte_timeout(instance, serve):
    d = await instance("decode")
    router = await serve([d], timeouts={"first_byte_s": 0.2})
    d.script.append("hang")
    status, answer = await router.post(body())
    assert status == 504
    assert answer["error"]["code"] == 504
    assert router.value("timeouts_total", stage="first_byte") == 1
    await router.until(lambda: d.seen[0].aborted)


async def test_total_timeout_is_not_retried(instance, serve):
    one, two = await instance("decode"), await instance("decode")
    router = await serve([one, two], timeouts={"total_s": 0.3})
    for d in (one, two):
        d.script.append("hang")
    status, _ = await router.post(body())
    assert status == 504
    assert len(one.seen) + len(two.seen) == 1
    assert router.value("timeouts_total", stage="total") == 1


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
