"""Who is a member: identity, epoch and readiness, and how soon a change is seen."""

from __future__ import annotations

import asyncio
import socket

import pytest

from vllm_suite.router.config import DnsTarget
from vllm_suite.router.discovery import DiscoveryError, DnsDiscovery, Target

DEFAULTS = {"poll_interval_s": 0.5, "poll_timeout_s": 1.0, "forget_after_s": 2.0}


async def test_only_the_state_answer_admits(instance, serve):
    good = await instance("decode")
    unready = await instance("decode", ready=False)
    draining = await instance("decode", draining=True)
    junk = await instance("decode", state_mode="junk")
    failing = await instance("decode", state_mode="500")
    router = await serve([good, unready, draining, junk, failing], ready=False)
    await router.until(lambda: len(router.router.pool.members) == 1)
    await asyncio.sleep(0.2)
    assert [member.instance_id for member in router.router.pool.members] == [good.instance_id]
    assert (await router.get("/ready"))[0] == 200
    good.ready = False
    await router.until(lambda: not router.router.pool.members[0].ready)
    assert (await router.get("/ready"))[0] == 503


async def test_control_key_is_sent(instance, serve):
    d = await instance("decode", state_key="k1")
    router = await serve([d], auth={"control_key": "k1"})
    assert router.router.pool.members[0].ready


@pytest.mark.parametrize("how", ["vanished", "frozen", "restarted"])
async def test_forgotten_within_two_seconds(instance, serve, how):
    """With the default times, history and counts included."""
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d], membership=DEFAULTS)
    await router.post({"prompt": list(range(100)), "model": "tiny"})
    old = next(member for member in router.router.pool.members if member.role == "decode")
    assert len(old.history) > 0
    assert router.value("history_chunks", instance=d.instance_id) > 0
    began = asyncio.get_running_loop().time()
    if how == "vanished":
        await d.stop()
    elif how == "frozen":
        d.state_mode = "hang"
    else:
        d.epoch = "e2"
    await router.until(lambda: old not in router.router.pool.members, timeout_s=2.5)
    assert asyncio.get_running_loop().time() - began <= 2.0 + 0.1
    if how == "restarted":
        await router.until(lambda: len(router.router.pool.members) == 2)
        assert router.value("membership_events_total", event="restarted") == 1
        assert router.value("history_chunks", instance=d.instance_id) == 0
    else:
        gone = f'instance="{d.instance_id}"'.encode()
        assert gone not in (await router.get("/metrics"))[1]


async def test_slow_state_sets_an_instance_back_and_no_more(instance, serve):
    """It gets work only where nobody else is ready, until it is forgotten."""
    slow, other = await instance("decode"), await instance("decode")
    router = await serve([slow, other], membership={"poll_timeout_s": 0.1, "forget_after_s": 5.0})
    member = next(m for m in router.router.pool.members if m.url == slow.url)
    slow.state_mode = "hang"
    await router.until(lambda: not member.ready)
    body = {"prompt": "x", "model": "tiny"}
    for _ in range(4):
        await router.post(body)
    assert (len(slow.seen), len(other.seen)) == (0, 4)
    other.ready = False
    await router.until(lambda: not any(m.ready for m in router.router.pool.members))
    assert (await router.post(body))[0] == 200
    assert len(slow.seen) == 1
    slow.state_mode = "ok"
    await router.until(lambda: member.ready)
    assert member in router.router.pool.members


async def test_one_instance_behind_two_addresses_counts_once(instance, serve):
    one = await instance("decode", instance_id="same")
    two = await instance("decode", instance_id="same")
    router = await serve([one, two], ready=False)
    await router.until(lambda: len(router.router.pool.members) == 1)
    await router.until(lambda: router.value("membership_events_total", event="duplicate") > 0)
    assert len(router.router.pool.members) == 1


async def test_the_instance_knows_its_role_best(instance, serve):
    p, d = await instance("prefill"), await instance("decode")
    router = await serve([p, d])
    p.role, d.role = "decode", "any"
    await router.until(lambda: [m.role for m in router.router.pool.members] == ["decode", "decode"])


async def test_requests_wait_a_moment_for_an_instance(instance, serve):
    d = await instance("decode", ready=False)
    router = await serve([d], ready=False, limits={"wait_for_instance_s": 2.0})
    task = asyncio.create_task(router.post({"prompt": "x", "model": "tiny"}))
    await asyncio.sleep(0.1)
    d.ready = True
    assert (await task)[0] == 200
    assert router.value("waits_total", outcome="found") == 1


async def test_no_instance_is_a_503(instance, serve):
    p = await instance("prefill")
    router = await serve([p], limits={"wait_for_instance_s": 0.1})
    async with router.client.post(router.url + "/v1/completions", json={"prompt": "x"}) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert (await response.json())["error"]["type"] == "ServiceUnavailableError"
    assert router.value("waits_total", outcome="gave_up") == 1
    assert (await router.get("/ready"))[0] == 503
    assert (await router.get("/v1/models"))[0] == 503


async def test_stock_instances_are_asked_by_public_routes(instance, serve):
    p, d = await instance("prefill", state_mode="500"), await instance("decode", state_mode="500")
    router = await serve([p, d], membership={"state": "stock"})
    assert {m.role for m in router.router.pool.members} == {"prefill", "decode"}
    status, _ = await router.post({"prompt": list(range(100)), "model": "tiny"})
    assert status == 200
    assert p.seen
    old = next(member for member in router.router.pool.members if member.role == "decode")
    await d.stop()
    await router.until(lambda: old not in router.router.pool.members)
    await d.start()
    await router.until(lambda: len(router.router.pool.members) == 2)
    assert old not in router.router.pool.members
    assert {m.epoch for m in router.router.pool.members} == {"stock-1", "stock-2"}


async def test_dns_names_are_resolved_again_and_again(instance, serve, monkeypatch, caplog):
    """127.0.0.1 and 127.0.0.2 stand for two pods behind one name."""
    d = await instance("decode")
    answers = [["127.0.0.1"]]

    async def resolve(host, port, **kwargs):
        assert (host, kwargs["family"]) == ("pods.test", socket.AF_INET)
        if answers[0] is None:
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in answers[0]]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    source = DnsDiscovery(DnsTarget(host="pods.test", port=d.port, role="decode"), 0.05)
    assert await source.targets() == {Target(d.url, "decode")}
    answers[0] = None
    with pytest.raises(DiscoveryError):
        await source.targets()

    answers[0] = ["127.0.0.1"]
    target = {"host": "pods.test", "port": d.port, "role": "decode"}
    router = await serve([], membership={"dns": [target], "dns_interval_s": 0.05})
    await router.until(lambda: len(router.router.pool.members) == 1)
    answers[0] = None  # a failing resolver changes nothing
    await router.until(lambda: router.value("membership_events_total", event="discovery_failed") > 2)
    assert len(router.router.pool.members) == 1
    assert len([record for record in caplog.records if "discovery" in record.message]) == 1
    answers[0] = []
    await router.until(lambda: not router.router.pool.members)


async def test_nothing_that_an_instance_says_ends_its_polling(instance, serve):
    """Deep nesting is a RecursionError of the parser; an id of a megabyte would be a label of series."""
    d = await instance("decode")
    router = await serve([d])
    await router.until(lambda: router.router.pool.members[0].ready)
    for mode, says in (("deep", {}), ("ok", {"instance_id": "i" * 1000})):
        d.state_mode, d.says = mode, says
        await router.until(lambda: not router.router.pool.members)
        d.state_mode, d.says = "ok", {}
        await router.until(lambda: bool(router.router.pool.members))


async def test_a_defect_in_a_source_or_a_probe_does_not_end_the_asking(instance, serve, caplog):
    d = await instance("decode")
    router = await serve([d])
    [watcher] = router.router._membership._watchers.values()
    ask, asked = watcher._probe.ask, []

    async def broken(url, timeout_s):
        asked.append(url)
        raise KeyError("nobody foresaw this")

    watcher._probe.ask = broken
    await router.until(lambda: len(asked) > 2)
    watcher._probe.ask = ask
    await router.until(lambda: any(member.ready for member in router.router.pool.members))
    assert len([record for record in caplog.records if record.exc_info]) == 1


async def test_a_name_that_can_be_none_is_no_end_of_discovery():
    """A label of more than 63 characters is a UnicodeError of the codec for names."""
    with pytest.raises(DiscoveryError):
        await DnsDiscovery(DnsTarget(host="x" * 70, port=1, role="decode"), 1.0).targets()
