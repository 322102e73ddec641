"""Encoders that die, hang, lie or refuse: what the request gets in the end, and that every step is counted."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest
from encoders import CONSUMER, chat, fleet, identities, image, kinds, parts_of
from scripted import REFERENCE

CHAT = "/v1/chat/completions"


def everywhere(es, *words):
    """The next calls to whichever encoders get these."""
    shared = deque(words)
    for e in es:
        e.script = shared


FAULTS = [
    ("500", "status"),
    ("503", "status"),
    ("429", "status"),
    ("404", "status"),
    ("reset", "disconnect"),
    ("garbage", "protocol"),
    ("hang", "timeout"),
    ("half", "timeout"),
    ("no_params", "no_reference"),
    ("no_item", "no_reference"),
    ("not_kept", "not_kept"),
    ("foreign", "wrong_reference"),
    ("other_content", "wrong_reference"),
]


def patience(word):
    """Short only where a call is to time out, and longer than a busy machine takes for a good answer."""
    return {"call_s": 1.5} if word in ("hang", "half") else {}


@pytest.mark.parametrize(("word", "kind"), FAULTS)
async def test_another_encoder_takes_over(instance, encoder, serve, word, kind):
    es, p, _, router = await fleet(instance, encoder, serve, settings=patience(word))
    everywhere(es, word)
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert sum(len(e.seen) for e in es) == 2
    assert kinds(p.seen[0].body) == {"image_embeds": 1}
    assert router.value("recoveries_total", step="encode_retry", reason=kind) == 1
    assert router.value("upstream_errors_total", stage="encode", kind=kind) == 1
    assert router.value("encode_items_total", modality="image", outcome="encoded") == 1
    assert all(m.encode_tokens == m.outstanding_requests == 0 for m in router.router.pool.members)
    if word in ("hang", "half"):
        await router.until(lambda: any(seen.aborted for e in es for seen in e.seen))


@pytest.mark.parametrize(("word", "kind"), FAULTS)
async def test_then_prefill_encodes_itself(instance, encoder, serve, word, kind):
    es, p, _, router = await fleet(instance, encoder, serve, settings=patience(word))
    for e in es:
        e.script.append(word)
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert kinds(p.seen[0].body) == {"image_url": 1}
    assert "ec_transfer_params" not in p.seen[0].body
    assert router.value("recoveries_total", step="encode_local", reason=kind) == 1
    assert router.value("encode_items_total", modality="image", outcome="local") == 1


@pytest.mark.parametrize(("word", "status"), [("500", 502), ("hang", 504), ("not_kept", 502)])
async def test_or_the_error_names_the_item(instance, encoder, serve, word, status):
    settings = {**patience(word), "fallback": "error"}
    es, p, d, router = await fleet(instance, encoder, serve, settings=settings)
    assert (await router.post(chat(image(seed=1)), path=CHAT))[0] == 200
    for e in es:
        e.script.append(word)
    code, answer = await router.post(chat(image(seed=1), image(seed=2)), path=CHAT)
    assert code == status
    assert answer["error"]["message"].startswith("item 1 (image_url): ")
    assert answer["error"]["param"] == "messages[0].content[1]"
    assert len(p.seen) == len(d.seen) == 1
    assert router.value("rejected_total", reason="media_unencoded") == 1


async def test_refused_for_their_roles_is_no_attempt(instance, encoder, serve):
    """Two change their roles, one after the other; each has begun nothing, and no retry is allowed."""
    settings = {"retries": 0, "fallback": "error"}
    es, p, _, router = await fleet(instance, encoder, serve, encoders=3, settings=settings)
    everywhere(es, "refused", "refused")
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert [len(e.seen) for e in es] == [1, 1, 1]
    assert kinds(p.seen[0].body) == {"image_embeds": 1}
    assert router.value("recoveries_total", step="encode_retry", reason="role") == 2
    # Any other failure is one.
    everywhere(es, "500")
    assert (await router.post(chat(image(seed=1)), path=CHAT))[0] == 502


async def test_only_the_item_that_was_not_kept_is_encoded_again(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, encoders=2)
    everywhere(es, "not_kept")
    assert (await router.post(chat(*[image(seed=seed) for seed in range(4)]), path=CHAT))[0] == 200
    assert sorted(map(len, (call for e in es for call in e.calls))) == [1, 2, 2]
    assert len(p.seen[0].body["ec_transfer_params"]) == 4


async def test_an_encoder_that_died_is_left_out(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve)
    await es[0].stop()
    for seed in range(6):
        assert (await router.post(chat(image(seed=seed)), path=CHAT))[0] == 200
    assert len(es[1].seen) == 6
    assert all(kinds(seen.body) == {"image_embeds": 1} for seen in p.seen)
    assert router.value("recoveries_total", step="encode_retry", reason="connect") <= 1
    await router.until(lambda: len(router.router.pool.members) == 3)
    await es[1].stop()
    assert (await router.post(chat(image(seed=9)), path=CHAT))[0] == 200
    assert kinds(p.seen[-1].body) == {"image_url": 1}


async def test_an_encoder_that_dies_in_the_middle(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, hold=asyncio.Event())
    task = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: any(e.seen for e in es))
    dying = next(e for e in es if e.seen)
    other = next(e for e in es if e is not dying)
    other.hold = None
    await dying.stop()
    assert (await task)[0] == 200
    assert len(other.seen) == 1
    assert kinds(p.seen[0].body) == {"image_embeds": 1}


async def test_one_corrupt_item_is_named_and_the_others_are_kept(instance, encoder, serve):
    es, p, d, router = await fleet(instance, encoder, serve, encoders=1)
    assert (await router.post(chat(*[image(seed=seed) for seed in range(4)]), path=CHAT))[0] == 200
    names = [identities(p.seen[0].body)[2]]
    es[0].epoch = "e2"  # forgets what it kept
    await router.until(lambda: any(m.epoch == "e2" for m in router.router.pool.members))
    es[0].broken.update(names)
    status, answer = await router.post(chat(*[image(seed=seed) for seed in range(4)]), path=CHAT)
    assert status == 400
    assert answer["error"]["message"] == ("item 2 (image_url): Failed to load image: cannot identify image file")
    assert answer["error"]["param"] == "messages[0].content[2]"
    assert len(p.seen) == len(d.seen) == 1
    assert router.value("recoveries_total", step="encode_split", reason="rejected") == 1
    assert router.value("encode_items_total", modality="image", outcome="failed") == 1
    # The other three were not harmed: the next request finds them.
    seen = len(es[0].seen)
    assert (await router.post(chat(*[image(seed=seed) for seed in (0, 1, 3)]), path=CHAT))[0] == 200
    assert len(es[0].seen) == seen


async def test_a_refusal_while_prefill_runs_is_still_named(instance, encoder, serve):
    es, p, d, router = await fleet(instance, encoder, serve, encoders=1, settings={"overlap": "always"})
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    es[0].broken.update(identities(p.seen[0].body))
    es[0].epoch = "e2"
    await router.until(lambda: any(m.epoch == "e2" for m in router.router.pool.members))
    es[0].hold = asyncio.Event()  # so that prefill answers first
    p.script.append("400")
    task = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: len(p.seen) == 2 and len(es[0].seen) == 2)
    es[0].hold.set()
    status, answer = await task
    assert (status, answer["error"]["message"][:20]) == (400, "item 0 (image_url): ")
    assert len(d.seen) == 1
    # Without prefill the same.
    direct = await serve([es[0], d], encode={"overlap": "always"})
    d.script.append("400")
    status, answer = await direct.post(chat(image()), path=CHAT)
    assert (status, answer["error"]["message"][:20]) == (400, "item 0 (image_url): ")


async def test_a_failure_while_prefill_runs_goes_to_the_next_candidate(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, settings={"overlap": "always"})
    everywhere(es, "500")
    p.script.append("slow")
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    [(name, entry)] = p.seen[0].body["ec_transfer_params"].items()
    order = [where["producer"] for where in entry["suite_pending"]["candidates"]]
    first, second = (next(e for e in es if e.instance_id == one) for one in order)
    assert first.calls == second.calls == [[name]]
    assert router.value("recoveries_total", step="encode_retry", reason="status") == 1


async def test_prefill_that_lacks_an_item_gets_the_media(instance, encoder, serve):
    """vLLM answers 500 and does not say why; the instance is well."""
    es, p, d, router = await fleet(instance, encoder, serve, encoders=1)
    p.script.append("500")
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert [kinds(seen.body) for seen in p.seen] == [{"image_embeds": 1}, {"image_url": 1}]
    assert "ec_transfer_params" not in p.seen[1].body
    assert identities(p.seen[0].body) == identities(p.seen[1].body)
    assert d.seen[0].body["kv_transfer_params"] == REFERENCE
    assert router.value("recoveries_total", step="media_sent", reason="status") == 1
    # What led nowhere once is not referred to again.
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert len(es[0].seen) == 2
    assert not es[0].probes


async def test_or_the_error_names_what_was_referred_to(instance, encoder, serve):
    _, p, d, router = await fleet(instance, encoder, serve, encoders=1, settings={"fallback": "error"})
    p.script.append("500")
    status, answer = await router.post(chat(image(), image(seed=1)), path=CHAT)
    assert status == 502
    assert "item 0 (image_url), item 1 (image_url)" in answer["error"]["message"]
    assert len(p.seen) == 1
    assert not d.seen


@pytest.mark.parametrize(("word", "stream"), [("500", False), ("500", True), ("role_error", True)])
async def test_decode_that_lacks_an_item_gets_the_media(instance, encoder, serve, word, stream):
    e, pd = await encoder(), await instance("any", ec=CONSUMER)
    router = await serve([e, pd], encode={"overlap": "never"}, recovery={"decode_retries": 0})
    pd.script.append(word)
    status, answer = await router.post(chat(image(), stream=stream), path=CHAT)
    assert status == 200
    assert [kinds(seen.body) for seen in pd.seen] == [{"image_embeds": 1}, {"image_url": 1}]
    if stream:
        assert answer.endswith(b"data: [DONE]\n\n")
        assert b"error" not in answer


async def test_a_streamed_answer_with_a_role_first_comes_whole(instance, encoder, serve):
    e, pd = await encoder(), await instance("any", ec=CONSUMER)
    router = await serve([e, pd], encode={"overlap": "never"})
    status, answer = await router.post(chat(image(), stream=True), path=CHAT)
    assert status == 200
    assert answer.count(b"data: ") == 5


async def test_a_client_that_leaves_ends_its_calls(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, hold=asyncio.Event())
    task = asyncio.create_task(router.post(chat(*[image(seed=seed) for seed in range(4)]), path=CHAT))
    await router.until(lambda: all(e.seen for e in es))
    task.cancel()
    await router.until(lambda: all(seen.aborted for e in es for seen in e.seen))
    await router.until(lambda: router.value("requests_in_flight") == 0)
    assert not p.seen
    assert all(m.encode_tokens == m.outstanding_requests == 0 for m in router.router.pool.members)
    assert router.value("client_disconnects_total", stage="encode") == 1
    assert router.value("encode_items_total", modality="image", outcome="left") == 4


async def test_a_call_that_another_request_waits_for_goes_on(instance, encoder, serve):
    es, _p, _, router = await fleet(instance, encoder, serve, encoders=1, hold=asyncio.Event())
    first = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: bool(es[0].seen))
    second = asyncio.create_task(router.post(chat(image(), text="another"), path=CHAT))
    await router.until(lambda: router.value("encode_shared_items_total", modality="image") == 1)
    first.cancel()
    await router.until(lambda: router.value("requests_in_flight") == 1)
    es[0].hold.set()
    assert (await second)[0] == 200
    assert len(es[0].seen) == 1
    assert not es[0].seen[0].aborted


async def test_a_client_that_leaves_during_the_overlap_ends_its_calls(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, settings={"overlap": "always"}, hold=asyncio.Event())
    p.script.append("hang")
    task = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: bool(p.seen) and any(e.seen for e in es))
    task.cancel()
    await router.until(lambda: p.seen[0].aborted and all(seen.aborted for e in es for seen in e.seen))


async def test_encoders_are_given_so_much_at_a_time(instance, encoder, serve):
    """448 x 448 pixels are taken for 256 tokens, so two fit, and the others wait in line."""
    settings = {"outstanding_tokens": 512, "shard_items": 1}
    es, _, _, router = await fleet(instance, encoder, serve, encoders=1, settings=settings, hold=asyncio.Event())
    task = asyncio.create_task(router.post(chat(*[image(448, 448, seed=seed) for seed in range(6)]), path=CHAT))
    await router.until(lambda: len(es[0].seen) == 2)
    member = next(m for m in router.router.pool.members if m.role == "encode")
    assert member.encode_tokens == 6 * 256
    assert member.outstanding_requests == 2
    es[0].hold.set()
    assert (await task)[0] == 200
    assert len(es[0].seen) == 6
    assert router.value("encode_queue_seconds_count") == 6


async def test_waiting_in_line_ends_too(instance, encoder, serve):
    settings = {"outstanding_tokens": 256, "shard_items": 1, "queue_s": 0.2}
    es, p, _, router = await fleet(instance, encoder, serve, encoders=1, settings=settings, hold=asyncio.Event())
    first = asyncio.create_task(router.post(chat(image(448, 448)), path=CHAT))
    await router.until(lambda: bool(es[0].seen))
    assert (await router.post(chat(image(448, 448, seed=1)), path=CHAT))[0] == 200
    assert kinds(p.seen[0].body) == {"image_url": 1}
    assert router.value("recoveries_total", step="encode_local", reason="queue") == 1
    es[0].hold.set()
    assert (await first)[0] == 200


async def test_busy_encoders_are_a_503_where_nothing_is_encoded_locally(instance, encoder, serve):
    settings = {"outstanding_tokens": 256, "shard_items": 1, "queue_s": 0.2, "fallback": "error"}
    es, _, _, router = await fleet(instance, encoder, serve, encoders=1, settings=settings, hold=asyncio.Event())
    first = asyncio.create_task(router.post(chat(image(448, 448)), path=CHAT))
    await router.until(lambda: bool(es[0].seen))
    async with router.client.post(router.url + CHAT, json=chat(image(448, 448, seed=1))) as response:
        assert response.status == 503
        assert response.headers["Retry-After"] == "1"
        assert "busy" in (await response.json())["error"]["message"]
    es[0].hold.set()
    assert (await first)[0] == 200


async def test_without_a_ready_encoder_prefill_encodes(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, encoders=1)
    es[0].ready = False
    await router.until(lambda: not next(m for m in router.router.pool.members if m.role == "encode").ready)
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert kinds(p.seen[0].body) == {"image_url": 1}
    assert router.value("recoveries_total", step="encode_local", reason="no_encoder") == 1


async def test_unsigned_references_are_refused_where_a_key_is_set(instance, encoder, serve, monkeypatch):
    monkeypatch.setenv("VLLM_SUITE_FLEET_KEY", "fleet")
    es, p, _, router = await fleet(instance, encoder, serve)
    everywhere(es, "unsigned")
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert router.value("recoveries_total", step="encode_retry", reason="wrong_reference") == 1
    assert len(p.seen[0].body["ec_transfer_params"]) == 1
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert router.value("encode_items_total", modality="image", outcome="kept") == 1  # the channel takes the key


async def test_the_end_of_the_router_cuts_calls_off(instance, encoder, serve):
    es, _, _, router = await fleet(instance, encoder, serve, encoders=1, hold=asyncio.Event())
    task = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: bool(es[0].seen))
    await router.router._chain._encode.close()
    assert (await task)[0] == 200
    await router.until(lambda: es[0].seen[0].aborted)
    assert router.value("recoveries_total", step="encode_local", reason="cut_off") == 1


@pytest.mark.parametrize("total", [1, 5])
async def test_the_prompt_counts_its_media(instance, encoder, serve, total):
    """So that a picture alone is enough for prefill elsewhere."""
    _, p, _, router = await fleet(instance, encoder, serve)
    images = [image(448, 448, seed=seed) for seed in range(total)]
    assert (await router.post(chat(*images, text="x"), path=CHAT))[0] == 200
    assert len(p.seen) == 1
    assert len(parts_of(p.seen[0].body)) == total
