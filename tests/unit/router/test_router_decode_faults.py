"""A decode instance fails before its first byte: another one, and what becomes of the reference."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from scripted import LONG, REFERENCE, body


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


async def upgraded(instance, serve):
    """Prefill and a decode of an old version, and a decode of a new one; the router asks seldom."""
    old, new = {"vllm": "0.32.0", "kv": "a"}, {"vllm": "0.33.0", "kv": "a"}
    p, d_old, d_new = [await instance(role, says=says) for role, says in
                       (("prefill", old), ("decode", old), ("decode", new))]  # fmt: skip
    slow = {"poll_interval_s": 5, "poll_timeout_s": 1, "forget_after_s": 10}
    return p, d_old, d_new, old, slow


async def test_a_retry_on_another_version_leaves_the_reference_behind(instance, serve):
    """The only decode instance left cannot take the blocks; it computes the prompt, and that is counted."""
    p, d_old, d_new, _, slow = await upgraded(instance, serve)
    router = await serve([p, d_old, d_new], membership=slow, policies={"decode": "round_robin"})
    await d_old.stop()
    statuses = [(await router.post(body(prompt=[number, *LONG])))[0] for number in range(3)]
    assert statuses == [200] * 3
    assert router.value("recoveries_total", step="decode_retry", reason="connect") == 1
    assert router.value("recoveries_total", step="reference_dropped", reason="other_version") == 1
    assert len(p.seen) == 1
    assert not any("kv_transfer_params" in seen.body for seen in d_new.seen)


async def test_a_retry_goes_where_the_blocks_are_of_use(instance, serve):
    p, d_old, d_new, old, slow = await upgraded(instance, serve)
    third = await instance("decode", says=old)
    router = await serve([p, d_old, d_new, third], membership=slow)
    for member in router.router.pool.members:
        # Least tokens: the one that will be gone comes first, the new one next.
        member.outstanding_tokens = {d_old.instance_id: 0, d_new.instance_id: 1}.get(member.instance_id, 10_000)
    await d_old.stop()
    status, _ = await router.post(body())
    assert status == 200
    assert third.seen[0].body["kv_transfer_params"] == REFERENCE
    assert not d_new.seen
    assert router.value("recoveries_total", step="reference_dropped", reason="other_version") == 0


async def test_a_decode_that_was_withdrawn_meanwhile_is_not_used(instance, serve, tmp_path):
    """Its address is taken back while prefill computes for it; what runs on it goes on."""
    file = tmp_path / "withdrawn"
    p, one, two = await instance("prefill"), await instance("decode"), await instance("decode")
    router = await serve([p, one, two], membership={"withdrawn_file": str(file)})
    long = [asyncio.create_task(router.post(body(prompt=[number, *LONG]))) for number in range(2)]
    for d in (one, two):
        d.hold = asyncio.Event()
    await router.until(lambda: len(one.seen) == len(two.seen) == 1)
    p.hold = asyncio.Event()
    for member in router.router.pool.members:
        member.outstanding_tokens += 10_000 * (member.instance_id == two.instance_id)
    late = asyncio.create_task(router.post(body(prompt=[7, *LONG])))
    await router.until(lambda: len(p.seen) == 3)
    file.write_text(one.url + "\n")
    await router.until(lambda: len(router.router.pool.members) == 2)
    for waiting in (p, one, two):
        waiting.hold.set()
    assert [status for status, _ in await asyncio.gather(*long, late)] == [200] * 3
    assert len(one.seen) == 1
    assert two.seen[1].body["kv_transfer_params"] == REFERENCE
    assert router.value("recoveries_total", step="decode_retry", reason="connect") == 0
    file.unlink()
    await router.until(lambda: len(router.router.pool.members) == 3)
    file.write_bytes(b"\xff")  # what cannot be read changes nothing
    await router.until(lambda: router.value("membership_events_total", event="discovery_failed") > 0)
    assert len(router.router.pool.members) == 3
