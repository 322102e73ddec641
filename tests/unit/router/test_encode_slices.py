"""One large item over several encoders: who gets which slice, what consumers are told, and every way it goes wrong."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import pytest
from encoders import ROWS, UNITS, chat, film, fleet, identities, image, kinds, parts_of
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.encoded import MAX_SLICES, Pending, Slice, item_content, slice_identifier
from vllm_suite.handoff import parse
from vllm_suite.router.encode.config import Slices
from vllm_suite.router.encode.slicing import counts

CHAT = "/v1/chat/completions"
LARGE = {"width": 1024, "height": 1024}  # 1337 rows by the first guess: enough for two slices of 512


async def start(instance, encoder, serve, slices=("image",), **kwargs):
    return await fleet(instance, encoder, serve, slices=slices, **kwargs)


def everywhere(es, *words):
    """The next calls to whichever encoder get these."""
    shared = deque(words)
    for e in es:
        e.script = shared


def told(seen):
    """What a consumer is told of the only item: its name and the sources."""
    [(name, entry)] = seen.body["ec_transfer_params"].items()
    return name, entry["suite_slices"]


async def test_one_large_picture_is_shared_by_two_encoders(instance, encoder, serve):
    es, p, d, router = await start(instance, encoder, serve)
    assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    [whole] = identities(p.seen[0].body)
    names = [slice_identifier(whole, index, 2) for index in range(2)]
    assert sorted(name for e in es for call in e.calls for name in call) == sorted(names)
    for e in es:
        [seen] = e.seen
        [name] = identities(seen.body)
        # Each gets the picture as it came, and the word which part of it to encode.
        assert parts_of(seen.body) == [image(**LARGE, uuid=name)]
        piece = {"of": whole, "index": names.index(name), "count": 2, "rows": 0}
        assert seen.body["ec_transfer_params"] == {"suite_encode_only": True, "suite_slices": {name: piece}}
    for seen in (p.seen[0], d.seen[0]):
        # A slice's answer does not size the whole item, so the media go along.
        assert parts_of(seen.body) == [image(**LARGE, uuid=whole)]
        name, sources = told(seen)
        assert name == whole
        refs = [parse(source["suite"]) for source in sources]
        assert [ref.content for ref in refs] == [item_content(one) for one in names]
        assert sum(ref.tokens for ref in refs) == ROWS
        assert {ref.producer for ref in refs} == {e.instance_id for e in es}
    assert router.value("encode_items_total", modality="image", outcome="encoded") == 1
    assert router.value("encode_slices_total", modality="image", outcome="encoded") == 2
    assert router.value("encode_requests_total", mode="encoded") == 1
    assert all(m.encode_tokens == m.outstanding_tokens == 0 for m in router.router.pool.members)


async def test_the_same_picture_again_is_not_encoded_again(instance, encoder, serve):
    es, p, _d, router = await start(instance, encoder, serve)
    for _ in range(3):
        assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    assert sum(len(e.seen) for e in es) == 2
    names = [parse(source["suite"]).content for source in told(p.seen[0])[1]]
    assert [parse(source["suite"]).content for source in told(p.seen[2])[1]] == names
    assert router.value("encode_items_total", modality="image", outcome="kept") == 2
    assert router.value("encode_slices_total", modality="image", outcome="kept") == 4


async def test_a_slice_that_is_gone_is_encoded_again_and_no_other(instance, encoder, serve):
    settings = {"slices": {"min_tokens": 2, "slice_tokens": 1}}  # the router learns that pictures have 64 rows here
    es, p, _d, router = await start(instance, encoder, serve, settings=settings)
    await router.post(chat(image(**LARGE)), path=CHAT)
    [lost] = es[1].kept
    es[1].kept.clear()
    assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    assert [call for e in es for call in e.calls].count([lost]) == 2
    assert sum(len(e.seen) for e in es) == 3
    assert len(told(p.seen[1])[1]) == 2
    assert router.value("encode_slices_total", modality="image", outcome="kept") == 1
    for e in es:
        e.kept.clear()
    assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    assert sum(len(e.seen) for e in es) == 5


FAULTS = [("500", "status"), ("reset", "disconnect"), ("not_kept", "not_kept"), ("foreign", "wrong_reference")]
FAULTS += [("no_item", "not_sliced"), ("unsaid", "not_sliced"), ("odd", "not_sliced")]


@pytest.mark.parametrize(("word", "kind"), FAULTS)
async def test_another_encoder_takes_over_a_slice(instance, encoder, serve, word, kind):
    es, p, _d, router = await start(instance, encoder, serve)
    everywhere(es, word)
    assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    assert sum(len(e.seen) for e in es) == 3
    assert len(told(p.seen[0])[1]) == 2
    assert router.value("recoveries_total", step="encode_retry", reason=kind) == 1
    assert router.value("encode_items_total", modality="image", outcome="encoded") == 1


async def test_then_prefill_encodes_the_whole_item(instance, encoder, serve):
    es, p, _d, router = await start(instance, encoder, serve)
    everywhere(es, "ok", *["not_kept"] * 8)
    assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    assert kinds(p.seen[0].body) == {"image_url": 1}
    assert "ec_transfer_params" not in p.seen[0].body
    assert router.value("recoveries_total", step="encode_local", reason="not_kept") == 1
    assert router.value("encode_items_total", modality="image", outcome="local") == 1
    assert router.value("encode_slices_total", modality="image", outcome="encoded") == 1
    assert router.value("encode_slices_total", modality="image", outcome="failed") == 1


async def test_or_the_request_fails_naming_the_item(instance, encoder, serve):
    es, p, _d, router = await start(instance, encoder, serve, settings={"fallback": "error"})
    everywhere(es, *["500"] * 8)
    status, answer = await router.post(chat(image(**LARGE)), path=CHAT)
    assert status == 502
    assert answer["error"]["message"].startswith("item 0 (image_url)")
    assert answer["error"]["param"] == "messages[0].content[0]"
    assert not p.seen


async def test_slices_that_do_not_make_up_the_item_are_not_used(instance, encoder, serve):
    es, p, _d, router = await start(instance, encoder, serve)
    everywhere(es, "short")
    assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    assert "ec_transfer_params" not in p.seen[0].body
    assert router.value("recoveries_total", step="encode_local", reason="wrong_slices") == 1


async def test_an_encoder_that_cannot_cut_gives_the_whole_item(instance, encoder, serve):
    es, p, _d, router = await start(instance, encoder, serve)
    everywhere(es, "uncut", "uncut")
    for _ in range(2):
        assert (await router.post(chat(image(**LARGE)), path=CHAT))[0] == 200
    [name] = {name for call in identities(p.seen[0].body) for name in [call]}
    for seen in p.seen:
        assert parse(seen.body["ec_transfer_params"][name]["suite"]).tokens == ROWS
        assert kinds(seen.body) == {"image_embeds": 1}
    assert sum(len(e.seen) for e in es) == 2
    assert router.value("encode_items_total", modality="image", outcome="kept") == 1


async def test_a_broken_picture_is_refused_by_name(instance, encoder, serve):
    es, _p, _d, router = await start(instance, encoder, serve)
    everywhere(es, "400", "400")
    status, answer = await router.post(chat(image(**LARGE)), path=CHAT)
    assert status == 400
    assert answer["error"]["message"].startswith("item 0 (image_url)")


async def test_prefill_that_runs_ahead_is_told_who_makes_each_slice(instance, encoder, serve):
    hold = asyncio.Event()
    settings = {"overlap": "always"}
    es, p, _d, router = await start(instance, encoder, serve, settings=settings, hold=hold)
    answer = asyncio.create_task(router.post(chat(image(**LARGE)), path=CHAT))
    await router.until(lambda: bool(p.seen))
    whole, sources = told(p.seen[0])
    pending = [msgspec.convert(source["suite_pending"], Pending) for source in sources]
    assert [one.identifier for one in pending] == [slice_identifier(whole, index, 2) for index in range(2)]
    assert {one.candidates[0].producer for one in pending} == {e.instance_id for e in es}
    assert kinds(p.seen[0].body) == {"image_url": 1}
    hold.set()
    assert (await answer)[0] == 200


async def test_two_requests_share_the_slices_under_way(instance, encoder, serve):
    hold = asyncio.Event()
    es, p, _d, router = await start(instance, encoder, serve, hold=hold)
    answers = [asyncio.create_task(router.post(chat(image(**LARGE)), path=CHAT)) for _ in range(2)]
    await router.until(lambda: router.value("encode_shared_items_total", modality="image") == 2)
    hold.set()
    assert [status for status, _ in await asyncio.gather(*answers)] == [200, 200]
    assert sum(len(e.seen) for e in es) == 2
    assert [len(told(seen)[1]) for seen in p.seen] == [2, 2]


WHOLE = {
    "small": ({}, [image(512, 512)], {}),
    "several of one size": ({}, [image(**LARGE, seed=1), image(**LARGE, seed=2)], {}),
    "switched off": ({"settings": {"slices": {"enabled": False}}}, [image(**LARGE)], {}),
    "one encoder": ({"encoders": 1}, [image(**LARGE)], {}),
    "encoders that make none": ({"slices": ()}, [image(**LARGE)], {}),
    "another modality": ({"slices": ("video",)}, [image(**LARGE)], {}),
    "processor options": ({}, [image(**LARGE)], {"mm_processor_kwargs": {"max_patches": 4}}),
}


@pytest.mark.parametrize("name", WHOLE)
async def test_what_stays_whole(instance, encoder, serve, name):
    options, parts, more = WHOLE[name]
    es, _p, _d, router = await start(instance, encoder, serve, **options)
    assert (await router.post(chat(*parts, **more), path=CHAT))[0] == 200
    seen = [seen for e in es for seen in e.seen]
    assert sum(len(identities(one.body)) for one in seen) == len(parts)
    assert all("suite_slices" not in one.body["ec_transfer_params"] for one in seen)


async def test_a_film_among_pictures(instance, encoder, serve):
    settings = {"slices": {"min_tokens": 2, "slice_tokens": 1}}
    long = film()
    long["video_url"]["url"] = "data:video/mp4;base64," + "AAAA" * 2000
    es, p, _d, router = await start(instance, encoder, serve, slices=("video",), settings=settings)
    assert (await router.post(chat(image(28, 28), long, image(28, 28, seed=2)), path=CHAT))[0] == 200
    cut = [seen.body["ec_transfer_params"].get("suite_slices", {}) for e in es for seen in e.seen]
    assert sum(map(len, cut)) == 2
    entries = list(p.seen[0].body["ec_transfer_params"].values())
    assert sorted(key for entry in entries for key in entry) == ["suite", "suite", "suite_slices"]
    assert [part["type"] for part in parts_of(p.seen[0].body)] == ["image_embeds", "video_url", "image_embeds"]


def members(*outstanding):
    return [SimpleNamespace(encode_tokens=tokens, slices=lambda _: True) for tokens in outstanding]


def items(*tokens):
    return [SimpleNamespace(tokens=one, modality="image") for one in tokens]


@pytest.mark.parametrize(
    ("tokens", "outstanding", "expected"),
    [
        ([4096], [0, 0], [2]),
        ([4096], [0, 0, 0, 0], [4]),
        ([4096], [0, 0, 5000, 5000], [2]),  # two are busy with more than the item
        ([4096], [0, 4096], [1]),
        ([4096], [0] * 20, [8]),
        ([1100], [0] * 4, [2]),  # a slice has 512 rows at least
        ([1023], [0] * 4, [1]),
        ([4096, 4096], [0, 0], [1, 1]),
        ([4096, 4096], [0, 0, 0, 0], [2, 2]),
        ([4096, 100, 100], [0, 0], [2, 1, 1]),
        ([4096, 3000, 3000], [0, 0], [1, 1, 1]),
    ],
)
def test_into_how_many(tokens, outstanding, expected):
    assert counts(items(*tokens), members(*outstanding), Slices()) == expected


@given(units=st.integers(0, 300), count=st.integers(2, MAX_SLICES))
def test_slices_are_every_unit_once_and_in_order(units, count):
    bounds = [Slice("x", index, count).bounds(units) for index in range(count)]
    assert bounds[0][0] == 0
    assert bounds[-1][1] == units
    assert all(one[1] == other[0] for one, other in pairwise(bounds))
    assert all(stop > start for start, stop in bounds) == (units >= count)
    assert max(stop - start for start, stop in bounds) - min(stop - start for start, stop in bounds) <= 1


def test_the_scripted_encoders_units_make_whole_slices():
    assert ROWS % UNITS == 0
