"""Media parts as they come from clients: what is found, refused, measured and named."""

from __future__ import annotations

import base64
import io
import json
import struct

import pytest
from encoders import chat, data_url, film, fleet, image, png, sound, wav
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vllm_suite.router.encode.config import Encode
from vllm_suite.router.encode.examine import PIECE, examine, scope_of, split_data_url
from vllm_suite.router.encode.parts import find_media, is_media
from vllm_suite.router.encode.refusal import BadMedia, MediaRefused
from vllm_suite.router.encode.sniff import measure

CHAT = "/v1/chat/completions"
PIXELS = 178_956_970


def admitted(part, **document):
    """One part's item after its check."""
    document = chat(part, **document)
    [item] = find_media(document, 10).items
    examine(item, *split_data_url(item.url), Encode(), scope_of(document))
    return item


def embeds(value, **more):
    return {"type": "image_embeds", "image_embeds": value, **more}


BAD_PARTS = [
    ({"type": "image_pil", "image_pil": "x"}, 400, "unsupported"),
    ({"type": "hologram_url", "hologram_url": {"url": "data:,"}}, 400, "unsupported"),
    ({"type": 7}, 400, "unsupported"),
    ({"type": ["text"]}, 400, "unsupported"),
    ({"type": "image_url"}, 400, "empty"),
    ({"type": "image_url", "image_url": None, "uuid": "s-guess"}, 400, "empty"),
    (embeds(None, uuid="s-guess"), 400, "empty"),
    (embeds({"image_grid_thw": [1, 8, 8]}, uuid="s-guess"), 400, "empty"),
    (embeds({"image_embeds": "AAAA", "image_grid_thw": [1.0, 8, 8]}), 400, "malformed"),
    (embeds({"image_embeds": "AAAA", "image_grid_thw": [8, 8]}), 400, "malformed"),
    (embeds({"image_embeds": "AAAA", "image_grid_thw": [1, -8, 8]}), 400, "malformed"),
    (embeds({"image_embeds": "AAAA", "image_grid_thw": [1, True, 8]}), 400, "malformed"),
    (embeds({"image_embeds": "AAAA", "other": [1]}), 400, "malformed"),
    ({"type": "image_url", "image_url": {"url": 7}}, 400, "malformed"),
    ({"type": "image_url", "image_url": {}}, 400, "malformed"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, 400, "malformed"),
    ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, 400, "malformed"),
    ({"type": "image_url", "image_url": {"url": 'data:image/"}],"x;base64,AAAA'}}, 400, "malformed"),
    ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, 400, "malformed"),
    ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": 'wav"},"uuid":"x'}}, 400, "malformed"),
    ({"type": "text", "text": "hi", "image_url": "http://10.0.0.1/", "uuid": "x"}, 400, "ambiguous"),
    ({"type": "image_url", "image_url": {"url": "data:,"}, "video_url": "http://10.0.0.1/"}, 400, "ambiguous"),
    ({"type": "text", "text": "hi", "image_url": None, "uuid": "s-guess"}, 400, "ambiguous"),
    ({"image_url": None, "uuid": "s-guess"}, 400, "empty"),
    ({"type": "audio_url", "image_url": {"url": "http://10.0.0.1/"}}, 400, "ambiguous"),
    ({"type": "prompt_embeds", "data": "AAAA", "image_url": "http://10.0.0.1/"}, 400, "ambiguous"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, 400, "empty"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAA"}}, 400, "bad_base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==AA=="}}, 400, "bad_base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA\nAA"}}, 400, "bad_base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,A*AA"}}, 400, "bad_base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAÄA"}}, 400, "bad_base64"),
    ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA,AAAA"}}, 400, "bad_base64"),
    (image(0, 64), 400, "no_pixels"),
    (image(100_000, 100_000), 400, "too_many_pixels"),
    ({"type": "image_url", "image_url": {"url": data_url(png()[:20])}}, 400, "broken"),
    ({"type": "image_url", "image_url": {"url": data_url(b"\xff\xd8\xff\xd9", "image/jpeg")}}, 400, "broken"),
    ({"type": "image_url", "image_url": {"url": "http://93.184.216.34/x.png"}}, 400, "url_disabled"),
    ({"image_url": "http://93.184.216.34/x.png"}, 400, "url_disabled"),
    ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, 400, "url_disabled"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "status", "reason"), BAD_PARTS)
async def test_bad_parts_are_refused_by_name(instance, encoder, serve, part, status, reason):
    es, p, d, router = await fleet(instance, encoder, serve, encoders=1)
    code, answer = await router.post(chat(image(seed=5), part), path=CHAT)
    assert code == status
    assert answer["error"]["message"].startswith("item 1 (")
    assert answer["error"]["param"] == "messages[0].content[1]"
    assert not any([es[0].seen, p.seen, d.seen])
    assert router.value("rejected_total", reason=f"media_{reason}") == 1


async def test_byte_limits(instance, encoder, serve):
    es, _, d, router = await fleet(
        instance, encoder, serve, encoders=1, settings={"item_bytes": 2000, "request_bytes": 3000}
    )
    large = {"type": "image_url", "image_url": {"url": data_url(bytes(2001), "image/x-raw")}}
    fits = [{"type": "image_url", "image_url": {"url": data_url(bytes([n]) * 1900, "image/x-raw")}} for n in range(2)]
    status, answer = await router.post(chat(large), path=CHAT)
    assert (status, answer["error"]["message"]) == (413, "item 0 (image_url): more than 2000 bytes")
    status, answer = await router.post(chat(*fits), path=CHAT)
    assert (status, answer["error"]["message"]) == (413, "more than 3000 bytes of media")
    assert not es[0].seen
    assert (await router.post(chat(fits[0]), path=CHAT))[0] == 200
    assert d.seen


async def test_large_media_pass_through_a_thread(instance, encoder, serve):
    es, p, _, router = await fleet(instance, encoder, serve, encoders=1)
    data = png() + bytes(5_000_000)
    part = {"type": "image_url", "image_url": {"url": data_url(data)}}
    assert (await router.post(chat(part), path=CHAT))[0] == 200
    sent = es[0].seen[0].body["messages"][0]["content"][0]
    assert sent["image_url"]["url"] == part["image_url"]["url"]
    assert len(p.seen[0].raw) < 10_000
    broken = part["image_url"]["url"][:3_000_000] + "*" + part["image_url"]["url"][3_000_001:]
    status, answer = await router.post(chat({"type": "image_url", "image_url": {"url": broken}}), path=CHAT)
    assert (status, answer["error"]["message"]) == (400, "item 0 (image_url): its data is not valid base64")


def test_padding_between_two_pieces_is_found():
    """Base64 is checked in pieces; each may be right by itself."""
    inner = base64.b64encode(bytes(PIECE * 3 // 4 - 1)).decode()
    assert len(inner) == PIECE
    assert inner.endswith("=")
    with pytest.raises(BadMedia, match="base64"):
        admitted({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{inner}AAAA"}})
    assert (
        admitted({"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{inner}"}}).size
        == PIECE * 3 // 4 - 1
    )


def test_a_bomb_behind_long_metadata_is_found():
    data = io.BytesIO()
    Image.new("RGB", (50, 60)).save(data, "JPEG")
    raw = data.getvalue()
    frame = raw.index(b"\xff\xc0")
    huge = raw[: frame + 5] + struct.pack(">HH", 60_000, 60_000) + raw[frame + 9 :]
    padding = b"".join(b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000) for _ in range(10))
    with pytest.raises(BadMedia, match="60000 x 60000 pixels"):
        admitted({"type": "image_url", "image_url": {"url": data_url(huge[:2] + padding + huge[2:], "image/jpeg")}})


async def test_media_in_python_s_own_json_are_refused(instance, encoder, serve):
    """NaN passes vLLM's parser and not ours; it must not be a way around the checks."""
    _, _, d, router = await fleet(instance, encoder, serve)
    raw = json.dumps(chat({"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}, top_p=float("nan")))
    status, _ = await router.post(raw.encode(), path=CHAT)
    assert status == 400
    assert not d.seen
    assert router.value("rejected_total", reason="media_not_json") == 1


def test_client_uuids_never_pass():
    """One client could otherwise put its picture under the name of another's."""
    document = chat(image(uuid="a"), embeds("AAAA", uuid="b"))
    found = find_media(document, 10)
    assert "uuid" not in document["messages"][0]["content"][1]
    examine(found.items[0], *split_data_url(found.items[0].url), Encode(), scope_of(document))
    assert json.loads(bytes(found.items[0].raw))["uuid"] == found.items[0].identity != "a"


def test_identity_is_of_the_content_and_of_who_may_share_it():
    one = admitted(image()).identity
    assert admitted(image(uuid="x")).identity == one
    assert admitted({"image_url": image()["image_url"]["url"]}).identity == one
    assert admitted({"type": "input_image", "image_url": image()["image_url"]["url"]}).identity == one
    others = [
        admitted(image(seed=1)),
        admitted(image(), cache_salt="a"),
        admitted(image(), cache_salt="b"),
        admitted(image(), model="other"),
        admitted(image(), mm_processor_kwargs={"a": 1}),
        admitted(image(), mm_processor_kwargs={"a": 2}),
        admitted(image(), media_io_kwargs={"a": 1}),
        admitted({"type": "video_url", "video_url": {"url": data_url(png(), "image/png")}}),
    ]
    names = {one, *(item.identity for item in others)}
    assert len(names) == 9
    assert all(len(name) == 34 and int(name[2:], 16) >= 0 for name in names)
    same = [admitted(image(), mm_processor_kwargs=order) for order in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    assert same[0].identity == same[1].identity
    assert admitted(image(), mm_processor_kwargs={}).identity == one


def test_sound_has_one_identity_however_it_comes():
    as_url = {"type": "audio_url", "audio_url": {"url": data_url(wav(), "audio/wav")}}
    assert admitted(sound()).identity == admitted(as_url).identity
    assert json.loads(bytes(admitted(sound()).raw))["type"] == "audio_url"


def test_films_as_frames_keep_their_borders():
    def frames(*data):
        text = ",".join(base64.b64encode(one).decode() for one in data)
        return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{text}"}}

    assert admitted(frames(b"abc", b"def")).identity != admitted(frames(b"abcdef")).identity
    assert admitted(frames(b"abc", b"def")).identity != admitted(frames(b"abcd", b"ef")).identity
    assert json.loads(bytes(admitted(frames(b"ab", b"c")).raw))["video_url"] == frames(b"ab", b"c")["video_url"]
    assert admitted(film()).identity != admitted(film(1)).identity


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (3, 700), (641, 479)])
def test_sides_are_what_a_decoder_finds(form, size):
    data = io.BytesIO()
    Image.new("RGB", size).save(data, form)
    raw = data.getvalue()
    assert measure(raw, len(raw), "image", PIXELS) == ("pixels", size[0] * size[1])


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 30}, {"exif": b"Exif\0\0" + bytes(40)}])
def test_every_kind_of_webp(options):
    data = io.BytesIO()
    Image.new("RGBA" if "lossless" in options else "RGB", (321, 123)).save(data, "WEBP", **options)
    raw = data.getvalue()
    assert measure(raw, len(raw), "image", PIXELS) == ("pixels", 321 * 123)


def test_jpeg_behind_long_metadata():
    data = io.BytesIO()
    Image.new("RGB", (50, 60)).save(data, "JPEG", progressive=True)
    raw = data.getvalue()
    padding = b"".join(b"\xff\xe2" + struct.pack(">H", 60_002) + bytes(60_000) for _ in range(3))
    longer = raw[:2] + padding + raw[2:]
    assert measure(longer, len(longer), "image", PIXELS) == ("pixels", 3000)
    assert measure(longer[:100_000], len(longer), "image", PIXELS) == ("bytes", len(longer))


def test_sound_is_measured_in_seconds():
    assert measure(wav(2.0), len(wav(2.0)), "audio", PIXELS).unit == "seconds"
    assert measure(wav(2.0), len(wav(2.0)), "audio", PIXELS).amount == pytest.approx(2.0, rel=0.01)
    assert measure(b"ID3" + bytes(100), 103, "audio", PIXELS) == ("bytes", 103)
    rateless = wav()[:28] + bytes(4) + wav()[32:]
    assert measure(rateless, len(rateless), "audio", PIXELS).unit == "bytes"


heads = st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8", b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WAVE", b"BM"]
)


@given(heads, st.binary(max_size=80), st.sampled_from(["image", "audio", "video"]))
@settings(max_examples=300)
def test_no_header_is_a_crash(head, rest, modality):
    try:
        found = measure(head + rest, len(head + rest), modality, PIXELS)
    except BadMedia:
        return
    assert found.amount >= 0


parts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["type", "text", "image_url", "url", "input_audio", "data", "format", "image_embeds", "uuid"]
            ),
            inner | st.sampled_from(["text", "image_url", "image_embeds", "input_audio"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(st.lists(parts, max_size=4))
@settings(max_examples=300)
def test_no_document_is_a_crash_and_nothing_hides(content):
    document = {"messages": [{"role": "user", "content": content}, 3, {"content": "x"}, {"content": None}]}
    try:
        found = find_media(document, 100)
    except MediaRefused:
        return
    assert len({item.index for item in found.items}) == len(found.items)
    taken = {item.part for item in found.items}
    for number, part in enumerate(content):
        if number in taken or not isinstance(part, dict):
            continue
        # What was not taken for media is nothing that vLLM would fetch or decode, by either of its rules.
        assert not is_media(part) or all(part.get(key) is None for key in ("image_url", "input_audio"))


@given(st.binary(min_size=1, max_size=3000), st.integers(0, 3))
def test_whatever_is_taken_is_passed_on_exactly(data, cut):
    text = base64.b64encode(data).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{text[: len(text) - cut]}"}}
    try:
        item = admitted(part)
    except BadMedia:
        assert cut
        return
    assert json.loads(bytes(item.raw))["video_url"] == part["video_url"]
    assert item.size == len(base64.b64decode(text[: len(text) - cut]))
