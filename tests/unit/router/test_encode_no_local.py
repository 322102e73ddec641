"""Instances without an encoder: what they cannot encode themselves they are not sent, and the client learns why."""

from __future__ import annotations

import pytest
from encoders import CONSUMER, chat, image, kinds

CHAT = "/v1/chat/completions"
BLIND = {**CONSUMER, "encodes": False}


async def start(instance, encoder, serve, prefill=BLIND, decode=BLIND, encoders=1, **settings):
    es = [await encoder() for _ in range(encoders)]
    p, d = await instance("prefill", ec=prefill), await instance("decode", ec=decode)
    router = await serve([*es, p, d], encode=settings, disaggregation={"history_chunks": 0})
    return es, p, d, router


async def test_without_encoders_the_error_names_the_item_and_nobody_is_asked(instance, encoder, serve):
    _, p, d, router = await start(instance, encoder, serve, encoders=0)
    status, answer = await router.post(chat(image()), path=CHAT)
    assert status == 503
    assert answer["error"]["message"] == "item 0 (image_url): no encode instance is ready"
    assert answer["error"]["param"] == "messages[0].content[0]"
    assert not p.seen
    assert not d.seen
    assert router.value("rejected_total", reason="media_unencoded") == 1
    assert router.value("encode_items_total", modality="image", outcome="failed") == 1
    assert (await router.post(chat(), path=CHAT))[0] == 200


@pytest.mark.parametrize(("word", "status"), [("500", 502), ("reset", 502)])
async def test_an_encoder_that_fails_is_the_error(instance, encoder, serve, word, status):
    (e,), p, _, router = await start(instance, encoder, serve)
    e.script.append(word)
    code, answer = await router.post(chat(image()), path=CHAT)
    assert code == status
    assert answer["error"]["message"].startswith("item 0 (image_url): ")
    assert not p.seen


@pytest.mark.parametrize(("prefill", "ahead"), [(BLIND, False), (CONSUMER, True)])
async def test_prefill_runs_ahead_only_where_it_takes_media(instance, encoder, serve, prefill, ahead):
    _, p, _, router = await start(instance, encoder, serve, prefill)
    assert (await router.post(chat(image(seed=1), image(seed=2)), path=CHAT))[0] == 200
    assert kinds(p.seen[0].body) == ({"image_url": 2} if ahead else {"image_embeds": 2})


async def test_items_that_cannot_be_had_any_more_are_the_error(instance, encoder, serve):
    _, p, _, router = await start(instance, encoder, serve)
    p.script.append("500")
    status, answer = await router.post(chat(image()), path=CHAT)
    assert status == 502
    assert "item 0 (image_url)" in answer["error"]["message"]
    assert len(p.seen) == 1


async def test_decode_with_an_encoder_is_the_way_out(instance, encoder, serve):
    _, _, d, router = await start(instance, encoder, serve, decode=CONSUMER, encoders=0)
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert kinds(d.seen[-1].body) == {"image_url": 1}
