"""The encode stage through a real router: who is sent what, and what is left out."""

from __future__ import annotations

import asyncio
import json

import msgspec
import pytest
from encoders import CONSUMER, ROWS, chat, film, fleet, identities, image, kinds, parts_of, sound
from scripted import REFERENCE

from vllm_suite.encoded import Pending
from vllm_suite.handoff import parse

CHAT = "/v1/chat/completions"


async def test_one_image_goes_through_all_stages(instance, encoder, serve):
    es, p, d, router = await fleet(instance, encoder, serve)
    status, _ = await router.post(chat(image(uuid="mine")), path=CHAT, headers={"X-Request-Id": "r1"})
    assert status == 200
    [to_e] = [seen for e in es for seen in e.seen]
    maker = next(e for e in es if e.seen)
    [name] = identities(to_e.body)
    assert name.startswith("s-")
    assert len(name) == 34
    assert to_e.body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": [image(uuid=name)]}],
        "max_tokens": 1,
        "stream": False,
        "temperature": 0,
        "ec_transfer_params": {"suite_encode_only": True},
    }
    assert to_e.headers["X-Request-Id"].startswith("r1-e")
    placeholder = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 8, 8]}, "uuid": name}
    for seen in (p.seen[0], d.seen[0]):
        assert parts_of(seen.body) == [placeholder]
        assert parse(seen.body["ec_transfer_params"][name]["suite"]).producer == maker.instance_id
    assert p.seen[0].body["kv_transfer_params"]["do_remote_decode"] is True
    assert d.seen[0].body["kv_transfer_params"] == REFERENCE
    assert "iVBOR" not in d.seen[0].raw.decode()
    assert router.value("encode_items_total", modality="image", outcome="encoded") == 1
    assert router.value("encode_requests_total", mode="encoded") == 1
    assert all(m.encode_tokens == m.outstanding_tokens == 0 for m in router.router.pool.members)


async def test_text_only_requests_skip_the_stage(instance, encoder, serve):
    es, _p, d, router = await fleet(instance, encoder, serve)
    for content in ("word " * 50, [{"type": "text", "text": "word " * 50}]):
        raw = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": content}]}, indent=1).encode()
        assert (await router.post(raw, path=CHAT))[0] == 200
        assert d.seen[-1].raw.startswith(raw.rstrip()[:-1].rstrip())  # the client's own bytes
    assert not any(e.seen for e in es)
    assert router.value("encode_admission_seconds_count") == 0


async def test_items_are_split_over_encoders_and_keep_their_order(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve)
    images = [image(seed=seed) for seed in range(8)]
    body = chat(*images)
    body["messages"].insert(0, {"role": "system", "content": "be brief"})
    body["messages"].append({"role": "user", "content": [image(seed=3), {"type": "text", "text": "and this?"}]})
    assert (await router.post(body, path=CHAT))[0] == 200
    sent = [name for e in es for call in e.calls for name in call]
    assert len(sent) == len(set(sent)) == 8  # the repeated one once
    assert min(len(e.seen) for e in es) >= 1
    assert [sum(map(len, e.calls)) for e in es] == [4, 4]
    order = identities(p.seen[0].body)
    assert len(order) == 9
    assert order[3] == order[8]
    assert set(order) == set(sent) == set(p.seen[0].body["ec_transfer_params"])
    assert [m["role"] for m in p.seen[0].body["messages"]] == ["system", "user", "user"]
    assert p.seen[0].body["messages"][2]["content"][1] == {"type": "text", "text": "and this?"}
    assert router.value("encode_items_total", modality="image", outcome="encoded") == 9


async def test_two_hundred_images_are_one_request(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve)
    assert (await router.post(chat(*[image(seed=seed) for seed in range(200)]), path=CHAT))[0] == 200
    counts = [sum(map(len, e.calls)) for e in es]
    assert sum(counts) == 200
    assert min(counts) >= 80
    assert all(len(call) <= 8 for e in es for call in e.calls)
    assert len(p.seen[0].body["ec_transfer_params"]) == 200
    status, answer = await router.post(chat(*[image() for _ in range(257)]), path=CHAT)
    assert (status, answer["error"]["message"]) == (400, "more than 256 media parts in one request")
    assert router.value("rejected_total", reason="media_too_many_items") == 1


async def test_every_kind_reaches_its_encoder(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1)
    tensor = {"type": "image_embeds", "image_embeds": {"image_embeds": "AAAA", "image_grid_thw": [1, 2, 2]}}
    assert (await router.post(chat(sound(), film(), {**tensor, "uuid": "x"}), path=CHAT))[0] == 200
    assert sorted(kinds(seen.body).popitem()[0] for seen in es[0].seen) == ["audio_url", "video_url"]
    parts = parts_of(p.seen[0].body)
    # Video keeps its media: vLLM's answer leaves its time scale out. Client embeddings pass without their uuid.
    assert [part["type"] for part in parts] == ["audio_embeds", "video_url", "image_embeds"]
    assert parts[2] == tensor
    assert len(p.seen[0].body["ec_transfer_params"]) == 2


async def test_embeddings_alone_pass_untouched(instance, encoder, serve):
    es, _p, d, router = await fleet(instance, encoder, serve)
    body = chat({"type": "image_embeds", "image_embeds": "AAAA"})
    assert (await router.post(body, path=CHAT))[0] == 200
    assert d.seen[0].body["messages"] == body["messages"]
    assert "ec_transfer_params" not in d.seen[0].body
    assert not any(e.seen for e in es)


async def test_media_stay_where_a_modality_has_client_embeddings_too(instance, encoder, serve):
    """vLLM refuses media and placeholders side by side, and a client's tensors among placeholders would pass."""
    _es, p, _d, router = await fleet(instance, encoder, serve)
    await router.post(chat(image(), {"type": "image_embeds", "image_embeds": "AAAA"}), path=CHAT)
    assert [part["type"] for part in parts_of(p.seen[0].body)] == ["image_url", "image_embeds"]


@pytest.mark.parametrize("word", ["bare", "bad_grid"])
async def test_media_go_along_where_the_family_has_no_placeholders(instance, encoder, serve, word):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1)
    es[0].script.append(word)
    await router.post(chat(image()), path=CHAT)
    [part] = parts_of(p.seen[0].body)
    assert part["type"] == "image_url"
    assert part["uuid"] in p.seen[0].body["ec_transfer_params"]


async def test_a_consumer_without_the_connector_gets_the_media(instance, encoder, serve):
    e, p, d = await encoder(), await instance("prefill"), await instance("decode")
    router = await serve([e, p, d])
    await router.post(chat(image()), path=CHAT)
    assert not e.seen
    for seen in (p.seen[0], d.seen[0]):
        assert "ec_transfer_params" not in seen.body
        assert parts_of(seen.body)[0]["uuid"].startswith("s-")
    assert router.value("encode_items_total", modality="image", outcome="local") == 1


async def test_encode_and_prefill_decode(instance, encoder, serve):
    e, pd = await encoder(), await instance("any", ec=CONSUMER)
    router = await serve([e, pd], encode={"overlap": "never"})
    assert (await router.post(chat(image(), stream=True), path=CHAT))[0] == 200
    assert parts_of(pd.seen[0].body)[0]["type"] == "image_embeds"
    assert len(e.seen) == 1


async def test_any_instances_encode_for_each_other_and_never_for_themselves(instance, encoder, serve):
    full = [await encoder("any", ec_role="ec_both") for _ in range(3)]
    router = await serve(full, encode={"overlap": "never"})
    for seed in range(6):
        for one in full:
            one.seen.clear()
        assert (await router.post(chat(image(seed=seed)), path=CHAT))[0] == 200
        used = [one for one in full if one.seen]
        assert len(used) == 2
        [decode] = [one for one in used if "suite_encode_only" not in one.seen[0].body["ec_transfer_params"]]
        [reference] = decode.seen[0].body["ec_transfer_params"].values()
        assert reference["suite"]["producer"] != decode.instance_id
    alone = await serve(full[:1])
    assert (await alone.post(chat(image(seed=99)), path=CHAT))[0] == 200
    assert parts_of(full[0].seen[-1].body)[0]["type"] == "image_url"


async def test_nobody_is_told_to_wait_for_itself(instance, encoder, serve):
    """An `any` instance that prefills is a candidate for the items of others only."""
    full = [await encoder("any", ec_role="ec_both") for _ in range(2)]
    d = await instance("decode", ec=CONSUMER)
    router = await serve([*full, d], encode={"overlap": "always"}, policies={"decode": "least_tokens"})
    pending = []
    for seed in range(8):
        assert (await router.post(chat(image(seed=seed)), path=CHAT))[0] == 200
        for one in [*full, d]:
            for seen in one.seen:
                for entry in (seen.body.get("ec_transfer_params") or {}).values():
                    if entry is not True and "suite_pending" in entry:
                        pending.append((one.instance_id, [c["producer"] for c in entry["suite_pending"]["candidates"]]))
    assert pending
    assert all(me not in candidates for me, candidates in pending)


async def test_who_encodes_leaves_prefill_to_others(instance, encoder, serve):
    full = [await encoder("any", ec_role="ec_both") for _ in range(3)]
    d = await instance("decode", ec=CONSUMER)
    router = await serve(
        [*full, d],
        encode={"overlap": "never"},
        disaggregation={"history_chunks": 0},
        policies={"decode": "round_robin"},
    )
    prefilled = 0
    for seed in range(12):
        for one in full:
            one.seen.clear()
        assert (await router.post(chat(image(seed=seed)), path=CHAT))[0] == 200
        for one in full:
            for seen in one.seen:
                if (seen.body.get("kv_transfer_params") or {}).get("do_remote_decode"):
                    prefilled += 1
                    assert len(one.seen) == 1
                    assert kinds(seen.body) == {"image_embeds": 1}
    assert prefilled


async def test_an_item_of_ones_own_is_not_referred_to(instance, encoder, serve):
    """It lies in the instance's own pool; a reference to oneself leads nowhere."""
    both = await encoder("any", ec_role="ec_both")
    other = await encoder("any", ec_role="ec_both")
    router = await serve([both, other], encode={"overlap": "never"})
    for _ in range(4):
        assert (await router.post(chat(image()), path=CHAT))[0] == 200
    for one in (both, other):
        for seen in one.seen:
            for entry in (seen.body.get("ec_transfer_params") or {}).values():
                assert entry is True or entry["suite"]["producer"] != one.instance_id


async def test_what_is_kept_is_not_sent_again(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve)
    await router.post(chat(image()), path=CHAT)
    await router.post(chat(image(), image(seed=1)), path=CHAT)
    calls = [call for e in es for call in e.calls]
    assert sorted(map(len, calls)) == [1, 1]
    assert sum(len(e.probes) for e in es) == 1
    assert router.value("encode_items_total", modality="image", outcome="kept") == 1
    assert router.value("encode_probes_total", outcome="answered") == 1
    assert len(p.seen[1].body["ec_transfer_params"]) == 2
    assert kinds(p.seen[1].body) == {"image_embeds": 2}
    # Another salt shares nothing, and neither does another model.
    await router.post(chat(image(), cache_salt="other"), path=CHAT)
    await router.post(chat(image(), model="tiny2"), path=CHAT)
    assert sum(map(len, [call for e in es for call in e.calls])) == 4
    assert router.value("encode_known_items") == 4


@pytest.mark.parametrize("mode", ["none", "silent", "junk", "close"])
async def test_an_item_that_is_not_known_to_be_kept_is_sent(instance, encoder, serve, mode):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1, settings={"probe_s": 0.3})
    await router.post(chat(image()), path=CHAT)
    es[0].probe_mode = mode
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert len(es[0].seen) == 2
    assert router.value("encode_items_total", modality="image", outcome="kept") == 0
    assert kinds(p.seen[1].body) == {"image_embeds": 1}


async def test_a_restarted_producer_is_not_asked_for_its_former_items(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1)
    await router.post(chat(image()), path=CHAT)
    es[0].epoch = "e2"
    await router.until(lambda: any(m.epoch == "e2" for m in router.router.pool.members))
    await router.post(chat(image()), path=CHAT)
    assert not es[0].probes
    assert len(es[0].seen) == 2
    [entry] = p.seen[1].body["ec_transfer_params"].values()
    assert entry["suite"]["epoch"] == "e2"


async def test_one_item_of_two_requests_is_encoded_once(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1, hold=asyncio.Event())
    first = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: bool(es[0].seen))
    second = asyncio.create_task(router.post(chat(image()), path=CHAT))
    await router.until(lambda: router.value("encode_shared_items_total", modality="image") == 1)
    es[0].hold.set()
    assert [status for status, _ in await asyncio.gather(first, second)] == [200, 200]
    assert len(es[0].seen) == 1
    assert len(p.seen) == 2
    assert all(kinds(seen.body) == {"image_embeds": 1} for seen in p.seen)


async def test_prefill_starts_while_items_are_encoded(instance, encoder, serve, monkeypatch):
    monkeypatch.setenv("VLLM_SUITE_FLEET_KEY", "fleet")
    es, p, d, router = await fleet(instance, encoder, serve, settings={"overlap": "auto"}, hold=asyncio.Event())
    p.hold = asyncio.Event()
    task = asyncio.create_task(router.post(chat(*[image(seed=seed) for seed in range(4)]), path=CHAT))
    await router.until(lambda: bool(p.seen) and sum(len(call) for e in es for call in e.calls) == 4)
    assert router.value("encode_item_seconds_count") == 0
    es[0].hold.set()
    await router.until(lambda: router.value("encode_item_seconds_count") == 4)
    p.hold.set()
    assert (await task)[0] == 200
    assert kinds(d.seen[0].body) == {"image_embeds": 4}
    to_p = p.seen[0].body
    assert kinds(to_p) == {"image_url": 4}
    ids = {e.instance_id for e in es}
    assert set(to_p["ec_transfer_params"]) == set(identities(to_p))
    for name, entry in to_p["ec_transfer_params"].items():
        pending = msgspec.convert(entry["suite_pending"], Pending)
        assert pending.identifier == name
        assert pending.right_signature(b"fleet")
        assert not pending.right_signature(b"other")
        assert {where.producer for where in pending.candidates} == ids
        first = next(e for e in es if e.instance_id == pending.candidates[0].producer)
        assert any(name in call for call in first.calls)
    assert router.value("encode_requests_total", mode="overlapped") == 1


async def test_a_single_item_does_not_overlap_unless_told(instance, encoder, serve):
    es, p, d, router = await fleet(instance, encoder, serve, settings={"overlap": "auto"})
    await router.post(chat(image()), path=CHAT)
    assert "suite" in next(iter(p.seen[0].body["ec_transfer_params"].values()))
    always = await serve([*es, p, d], encode={"overlap": "always"})
    await always.post(chat(image(seed=1)), path=CHAT)
    assert "suite_pending" in next(iter(p.seen[1].body["ec_transfer_params"].values()))
    # Decode comes when everything has landed.
    assert kinds(d.seen[1].body) in ({"image_embeds": 1}, {"image_url": 1})


async def test_processor_options_make_identifiers_that_only_the_encoder_knows(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1, settings={"overlap": "always"})
    es[0].script.append("odd")
    options = {"mm_processor_kwargs": {"max_pixels": 1000}}
    assert (await router.post(chat(image(), image(seed=1), **options), path=CHAT))[0] == 200
    assert es[0].seen[0].body["mm_processor_kwargs"] == {"max_pixels": 1000}
    names = identities(p.seen[0].body)
    assert len(p.seen[0].body["ec_transfer_params"]) == 2
    assert not set(names) & set(p.seen[0].body["ec_transfer_params"])
    assert all("suite" in entry for entry in p.seen[0].body["ec_transfer_params"].values())
    await router.post(chat(image()), path=CHAT)
    assert not set(names) & set(identities(p.seen[1].body))


async def test_odd_identifiers_are_remembered_of_a_model(instance, encoder, serve):
    es, p, _d, router = await fleet(instance, encoder, serve, encoders=1, settings={"overlap": "always"})
    es[0].script.extend(["odd", "odd"])
    assert (await router.post(chat(image()), path=CHAT))[0] == 200
    assert (await router.post(chat(image(seed=1)), path=CHAT))[0] == 200
    assert "suite" in next(iter(p.seen[1].body["ec_transfer_params"].values()))


async def test_costs_are_learned_from_answers(instance, encoder, serve):
    _es, _p, _d, router = await fleet(instance, encoder, serve, encoders=1)
    before = router.value("encode_tokens_total", modality="image")
    await router.post(chat(image(448, 448, seed=1)), path=CHAT)
    guessed = router.value("encode_tokens_total", modality="image") - before
    assert guessed == 256
    for seed in range(2, 12):
        await router.post(chat(image(448, 448, seed=seed)), path=CHAT)
    total = router.value("encode_tokens_total", modality="image")
    await router.post(chat(image(448, 448, seed=20)), path=CHAT)
    assert router.value("encode_tokens_total", modality="image") - total == ROWS
    assert router.value("encode_tokens_per_second") > 0


async def test_the_instances_route_shows_the_encode_pool(instance, encoder, serve):
    es, _p, _d, router = await fleet(instance, encoder, serve, hold=asyncio.Event())
    task = asyncio.create_task(router.post(chat(image(448, 448)), path=CHAT))
    await router.until(lambda: any(e.seen for e in es))
    _, answer = await router.get("/suite/v1/instances")
    assert answer["encode"]["instances"] == answer["encode"]["ready"] == 2
    assert answer["encode"]["outstanding_tokens"] == 256
    busy = next(row for row in answer["instances"] if row["outstanding_encode_tokens"])
    assert busy["ec"]["role"] == "ec_producer"
    text = (await router.get("/metrics"))[1].decode()
    labels = f'{{instance="{busy["instance_id"]}",role="encode"}}'
    assert f"vllm_suite_router_outstanding_encode_tokens{labels} 256.0" in text
    es[0].hold.set()
    await task
    assert (await router.get("/suite/v1/instances"))[1]["encode"]["outstanding_tokens"] == 0


async def test_switched_off_it_leaves_bodies_alone(instance, encoder, serve):
    es, _p, d, router = await fleet(instance, encoder, serve, settings={"enabled": False})
    body = chat(image(uuid="mine"), {"type": "image_url", "image_url": {"url": "http://10.0.0.1/x"}})
    assert (await router.post(body, path=CHAT))[0] == 200
    assert d.seen[0].body["messages"] == body["messages"]
    assert not any(e.seen for e in es)


async def test_behind_another_router_references_pass(instance, encoder, serve):
    e, pd = await encoder(), await instance("any", ec=CONSUMER)
    router = await serve([e, pd], trust_transfer_params=True)
    part = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 8, 8]}, "uuid": "s-1"}
    body = chat(part, ec_transfer_params={"s-1": {"suite": {}}})
    assert (await router.post(body, path=CHAT))[0] == 200
    assert pd.seen[0].body == body
    assert not e.seen
