"""The question to producers which items they keep, over the item channel."""

from __future__ import annotations

import asyncio

import pytest

from vllm_suite.encoded import MAX_KEYS, item_content
from vllm_suite.router.encode.encoded_client import EncodedClient, Keeper, ProbeFailed


def keeper(encoder, **over):
    return Keeper(encoder.instance_id, over.get("epoch", encoder.epoch), encoder.ec["host"], encoder.ec["port"])


async def test_kept_items_over_one_connection(encoder):
    e = await encoder()
    e.kept = {"a": 4, "b": 8}
    client = EncodedClient(None)
    for _ in range(3):
        refs = await client.kept(keeper(e), ["a", "x", "b"], 5.0, 2.0)
        assert {name: ref.tokens for name, ref in refs.items()} == {"a": 4, "b": 8}
        assert refs["a"].content == item_content("a")
        assert refs["a"].lease_s == 5.0
    assert e.connections == 1
    many = [f"n{number}" for number in range(MAX_KEYS + 5)]
    e.kept = dict.fromkeys(many[:900], 1)
    assert len(await client.kept(keeper(e), many, 5.0, 5.0)) == 900
    assert [len(names) for names in e.probes[-2:]] == [MAX_KEYS, 5]
    client.close()


async def test_questions_side_by_side(encoder):
    e = await encoder()
    e.kept = {f"n{number}": number + 1 for number in range(50)}
    client = EncodedClient(None)
    answers = await asyncio.gather(*(client.kept(keeper(e), [f"n{number}"], 5.0, 5.0) for number in range(50)))
    assert [next(iter(refs.values())).tokens for refs in answers] == list(range(1, 51))
    assert e.connections == 1
    client.close()


async def test_the_fleet_key_proves_both_sides(encoder, monkeypatch):
    monkeypatch.setenv("VLLM_SUITE_FLEET_KEY", "one")
    e = await encoder()
    e.kept = {"a": 4}
    right = EncodedClient(b"one")
    assert set(await right.kept(keeper(e), ["a"], 5.0, 2.0)) == {"a"}
    right.close()
    for key in (b"two", None):
        wrong = EncodedClient(key)
        with pytest.raises(ProbeFailed) as caught:
            await wrong.kept(keeper(e), ["a"], 5.0, 2.0)
        assert caught.value.reason == "protocol"
        wrong.close()


async def test_references_of_others_are_left_out(encoder):
    e = await encoder()
    e.kept = {"a": 4}
    client = EncodedClient(None)
    assert await client.kept(keeper(e), ["a"], 5.0, 2.0)
    e.epoch = "e2"  # the connection is from before the restart, its references are not
    assert await client.kept(keeper(e, epoch="e1"), ["a"], 5.0, 2.0) == {}
    client.close()
    other = EncodedClient(None)
    with pytest.raises(ProbeFailed) as caught:
        await other.kept(keeper(e, epoch="e1"), ["a"], 5.0, 2.0)
    assert caught.value.reason == "protocol"
    other.close()


@pytest.mark.parametrize(("mode", "reason"), [("silent", "timeout"), ("junk", "protocol"), ("close", "disconnect")])
async def test_no_answer_is_a_failure_and_a_rest(encoder, mode, reason):
    e = await encoder()
    e.probe_mode = mode
    client = EncodedClient(None)
    with pytest.raises(ProbeFailed) as caught:
        await client.kept(keeper(e), ["a"], 5.0, 0.3)
    assert caught.value.reason == reason
    connections = e.connections
    with pytest.raises(ProbeFailed) as caught:
        await client.kept(keeper(e), ["a"], 5.0, 0.3)
    assert caught.value.reason == "resting"
    assert e.connections == connections
    client.close()


async def test_nobody_there(encoder):
    e = await encoder()
    gone = keeper(e)
    await e.stop()
    client = EncodedClient(None)
    with pytest.raises(ProbeFailed) as caught:
        await client.kept(gone, ["a"], 5.0, 2.0)
    assert caught.value.reason == "disconnect"
    client.close()


async def test_a_connection_that_was_idle_too_long_is_opened_anew(encoder):
    """Producers close those; that is no failure."""
    e = await encoder()
    e.kept = {"a": 4}
    client = EncodedClient(None)
    assert await client.kept(keeper(e), ["a"], 5.0, 2.0)
    for writer in e._channels:
        writer.close()
    assert await client.kept(keeper(e), ["a"], 5.0, 2.0)
    assert e.connections == 2
    client.close()


async def test_closing_ends_questions(encoder):
    e = await encoder()
    client = EncodedClient(None)
    assert await client.kept(keeper(e), ["a"], 5.0, 10.0) == {}
    e.probe_mode = "silent"
    task = asyncio.create_task(client.kept(keeper(e), ["a"], 5.0, 10.0))
    async with asyncio.timeout(3):
        while len(e.probes) < 2:
            await asyncio.sleep(0.01)
    client.close()
    with pytest.raises(ProbeFailed):
        await asyncio.wait_for(task, 2)
    assert e.connections == 1
