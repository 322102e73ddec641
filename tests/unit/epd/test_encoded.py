"""The wire format: what is written is what is read, and a signature covers every field."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.encoded import (
    Challenge,
    Claim,
    Granted,
    Hello,
    Kept,
    Pending,
    Probe,
    Producer,
    Refused,
    Release,
    Welcome,
    Where,
    answer_decoder,
    hello_mac,
    item_content,
    item_location,
    read_frame,
    request_decoder,
)
from vllm_suite.frames import BadMessage, Idle, frame
from vllm_suite.handoff import parse

KEY = b"key"
OWN = Producer("p", "e", "m", "l", "127.0.0.1", 5601)
REF = OWN.reference("a", "item-1", 16, 30, KEY)
PENDING = Pending(
    identifier="a", candidates=(Where("p", "e", "127.0.0.1", 1), Where("q", "f", "127.0.0.2", 2)), wait_s=60
).signed(KEY)

REQUESTS = [
    Hello(1, "name", b"mac"),
    Claim(2, "a", REF, "p", "e", "m", "l", 16, 0.0, 5.0),
    Claim(3, "a", None, "p", "e", "m", "l", 16, 60.0, 5.0),
    Release(4, 7, True),
    Probe(5, ("a", "b"), 5.0),
]
ANSWERS = [
    Challenge(b"nonce"),
    Welcome(1, "p", "e", "m", "l", "agent", b"metadata"),
    Granted(2, 7, 16, 64, "bfloat16", 2048, (1 << 63) - 1, b"c" * 16, (((1 << 64) - 1, 2048),), "VRAM", 3, 5.0),
    Refused(3, "unknown"),
    Kept(4, {"a": REF}),
]


def reader_of(data: bytes, end: bool = True) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    if end:
        reader.feed_eof()
    return reader


@pytest.mark.parametrize("message", REQUESTS)
async def test_requests_arrive_as_they_were(message: Any) -> None:
    assert await read_frame(reader_of(frame(message)), request_decoder) == message
    with pytest.raises(BadMessage):
        await read_frame(reader_of(frame(message)), answer_decoder)


@pytest.mark.parametrize("message", ANSWERS)
async def test_answers_arrive_as_they_were(message: Any) -> None:
    assert await read_frame(reader_of(frame(message)), answer_decoder) == message
    with pytest.raises(BadMessage):
        await read_frame(reader_of(frame(message)), request_decoder)


async def test_messages_follow_each_other() -> None:
    reader = reader_of(b"".join(frame(message) for message in REQUESTS))
    assert [await read_frame(reader, request_decoder) for _ in REQUESTS] == REQUESTS
    with pytest.raises(asyncio.IncompleteReadError):
        await read_frame(reader, request_decoder)


@given(junk=st.binary(max_size=200))
def test_junk_is_a_bad_message_or_the_end(junk: bytes) -> None:
    async def read_all() -> None:
        reader = reader_of(junk)
        while True:
            await read_frame(reader, request_decoder)

    with pytest.raises((BadMessage, asyncio.IncompleteReadError)):
        asyncio.run(read_all())


@pytest.mark.parametrize("message", REQUESTS)
@pytest.mark.parametrize("change", ["unknown field", "missing field", "wrong type"])
async def test_a_message_with_other_fields_is_none(message: Any, change: str) -> None:
    fields = msgspec.to_builtins(message)
    last = list(fields)[-1]
    if change == "unknown field":
        fields["more"] = 1
    elif change == "missing field":
        del fields[last]
    else:
        fields[last] = {"not": "this"}
    body = msgspec.msgpack.encode(fields)
    with pytest.raises(BadMessage):
        await read_frame(reader_of(struct.pack("!I", len(body)) + body), request_decoder)


async def test_the_limit_is_on_the_message_not_its_length_field() -> None:
    data = frame(REQUESTS[0])
    assert await read_frame(reader_of(data), request_decoder, limit=len(data) - 4) == REQUESTS[0]
    with pytest.raises(BadMessage, match="limit"):
        await read_frame(reader_of(data), request_decoder, limit=len(data) - 5)


async def test_a_silent_peer_and_one_that_stops_are_told_apart() -> None:
    data = frame(REQUESTS[0])
    reader = reader_of(b"", end=False)
    with pytest.raises(Idle):
        await read_frame(reader, request_decoder, idle_timeout_s=0.01, frame_timeout_s=0.01)
    reader.feed_data(data)
    assert await read_frame(reader, request_decoder, idle_timeout_s=5) == REQUESTS[0], "nothing was lost"
    for length in (1, 3, 4, len(data) - 1):
        with pytest.raises(TimeoutError) as caught:
            await read_frame(reader_of(data[:length], end=False), request_decoder, frame_timeout_s=0.01)
        assert not isinstance(caught.value, Idle)


# --- references and pending items ---


def test_a_reference_says_where_and_what() -> None:
    assert REF.request_id == "item-1"
    assert (REF.producer, REF.epoch, REF.model, REF.layout) == ("p", "e", "m", "l")
    assert (REF.claim_host, REF.claim_port, REF.tokens) == ("127.0.0.1", 5601, 16)
    assert REF.content == item_content("a")
    assert REF.location == item_location("a", "127.0.0.1", 5601)
    assert parse(msgspec.json.decode(msgspec.json.encode(REF.to_json()))) == REF
    assert REF.check_signature(KEY) is None
    assert REF.check_signature(b"other") is not None


def test_contents_and_locations_are_all_different() -> None:
    assert item_content("a") != item_content("b")
    places = [("a", "h", 12), ("a", "h1", 2), ("ah", "", 12), ("a", "h", 13), ("b", "h", 12)]
    assert len({item_location(*place) for place in places}) == len(places)


@pytest.mark.parametrize("wait_s", [60, 60.0, 0.1])
def test_a_pending_item_survives_json(wait_s: float) -> None:
    pending = msgspec.structs.replace(PENDING, wait_s=wait_s).signed(KEY)
    again = msgspec.convert(msgspec.json.decode(msgspec.json.encode(msgspec.to_builtins(pending))), Pending)
    assert again.right_signature(KEY)
    assert again.candidates == PENDING.candidates


def test_the_signature_of_a_pending_item_covers_everything() -> None:
    assert PENDING.right_signature(KEY)
    assert not PENDING.right_signature(b"other")
    first, second = PENDING.candidates
    others: list[dict[str, Any]] = [{"identifier": "b"}, {"wait_s": 61.0}, {"mac": ""}, {"candidates": (first,)}]
    others.append({"candidates": (second, first)})
    for name in Where.__struct_fields__:
        value = getattr(first, name)
        other = msgspec.structs.replace(first, **{name: value + "0" if isinstance(value, str) else value + 1})
        others.append({"candidates": (other, second)})
    for change in others:
        assert not msgspec.structs.replace(PENDING, **change).right_signature(KEY), change
        assert msgspec.structs.replace(PENDING, **change).right_signature(None), "no key, no signature"


def test_a_greeting_proves_name_and_nonce() -> None:
    macs = {hello_mac(key, nonce, name) for key in (b"a", b"b") for nonce in (b"1", b"2") for name in ("x", "y")}
    assert len(macs) == 8
    assert hello_mac(None, b"1", "x") == b""
