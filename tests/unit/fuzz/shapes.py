"""Strategies that know what travels: JSON bodies, heads, chunks, events, references to KV blocks."""

from __future__ import annotations

import gzip
import itertools
import json
from typing import Any

from hypothesis import strategies as st
from wild import Raw

_TEXT = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["tiny", "", "\ud800", "\x00", "é" * 3, "data:image/png;base64,AAAA", "http://127.0.0.1:1/", "s-"]),
)
_NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63) - 1, 1e400, -1e400, float("nan"), 0.5, -0.0]),
)
_LEAF = st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXT)
ANY_JSON = st.recursive(
    _LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4), max_leaves=8
)

REFERENCE = st.fixed_dictionaries(
    {},
    optional={
        "do_remote_prefill": st.booleans() | ANY_JSON,
        "do_remote_decode": st.booleans() | ANY_JSON,
        "remote_block_ids": st.just([[1, 2]]) | ANY_JSON,
        "remote_engine_id": _TEXT,
        "remote_host": _TEXT,
        "remote_port": _NUMBERS,
        "suite": st.just({"version": 1, "epoch": "e", "mac": "00"}) | ANY_JSON,
    },
)

_URL = st.fixed_dictionaries({"url": _TEXT}, optional={"detail": _TEXT, "uuid": ANY_JSON}) | ANY_JSON
_PART = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": _TEXT}),
    st.fixed_dictionaries({"type": st.sampled_from(["image_url", "audio_url", "video_url"]), "image_url": _URL}),
    st.fixed_dictionaries({"type": st.just("input_audio"), "input_audio": ANY_JSON}),
    st.fixed_dictionaries({"type": st.just("image_embeds"), "image_embeds": ANY_JSON}),
    st.fixed_dictionaries({"image_url": _URL}, optional={"uuid": ANY_JSON, "type": ANY_JSON}),
    ANY_JSON,
)
_MESSAGE = (
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | ANY_JSON},
        optional={"content": _TEXT | st.lists(_PART, max_size=4) | ANY_JSON, "tool_calls": ANY_JSON, "name": ANY_JSON},
    )
    | ANY_JSON
)
_PROMPT = st.one_of(
    _TEXT, st.lists(st.integers(0, 500), max_size=40), st.lists(st.lists(st.integers(0, 9)), max_size=3)
)

DOCUMENT = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("tiny") | ANY_JSON,
        "prompt": _PROMPT | ANY_JSON,
        "messages": st.lists(_MESSAGE, max_size=3) | ANY_JSON,
        "max_tokens": _NUMBERS | ANY_JSON,
        "max_completion_tokens": _NUMBERS | ANY_JSON,
        "stream": st.booleans() | ANY_JSON,
        "stream_options": ANY_JSON,
        "n": st.sampled_from([1, 2]) | ANY_JSON,
        "best_of": ANY_JSON,
        "echo": ANY_JSON,
        "prompt_logprobs": ANY_JSON,
        "prompt_embeds": ANY_JSON,
        "tools": ANY_JSON,
        "user": ANY_JSON,
        "cache_salt": ANY_JSON,
        "response_format": ANY_JSON,
        "mm_processor_kwargs": ANY_JSON,
        "kv_transfer_params": REFERENCE | ANY_JSON,
        "ec_transfer_params": ANY_JSON,
        "vllm_xargs": st.fixed_dictionaries({}, optional={"kv_transfer_params": REFERENCE, "dler_class": ANY_JSON}),
        "extra": ANY_JSON,
    },
)


def encoded(value: Any, ascii_only: bool = True) -> bytes:
    """As Python's own JSON, NaN, infinities and lone surrogates included."""
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@st.composite
def _cut(draw: st.DrawFn, bodies: st.SearchStrategy[bytes]) -> bytes:
    body = draw(bodies)
    at = draw(st.integers(0, len(body)))
    return draw(st.sampled_from([body[:at], body[:at] + b"\xff" + body[at:], body + body[:at], body[at:]]))


_JSON_BYTES = st.builds(encoded, DOCUMENT | ANY_JSON, st.booleans())
BODY = st.one_of(
    _JSON_BYTES,
    _JSON_BYTES,
    _cut(_JSON_BYTES),
    st.binary(max_size=40),
    st.builds(lambda n: b'{"prompt":' + b"[" * n + b"]" * n + b"}", st.sampled_from([5, 900, 1100, 20_000])),
    st.builds(lambda n: b"[" * n, st.sampled_from([900, 20_000])),
    st.builds(lambda value: encoded(value).decode().encode("utf-16"), DOCUMENT),
)

_FIELD = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF), max_size=20).map(lambda v: v.encode("latin-1"))
HEADER = st.one_of(
    st.tuples(
        st.just(b"Content-Type"), st.sampled_from([b"application/json", b"text/plain", b"", b";", b"a/b; charset=\xff"])
    ),
    st.tuples(st.just(b"Content-Encoding"), st.sampled_from([b"gzip", b"deflate", b"br", b"zstd", b"identity", b"x"])),
    st.tuples(st.just(b"X-Request-Id"), _FIELD),
    st.tuples(st.sampled_from([b"X-Suite-Stage", b"X-Suite-Probe", b"X-Data-Parallel-Rank", b"X-Suite-"]), _FIELD),
    st.tuples(st.just(b"Authorization"), st.sampled_from([b"Bearer key", b"Bearer", b"Bearer \xff", b"Basic a", b""])),
    st.tuples(
        st.just(b"Connection"), st.sampled_from([b"close", b"keep-alive, x", b",,", b"upgrade", b"x-request-id"])
    ),
    st.tuples(st.just(b"Expect"), st.sampled_from([b"100-continue", b"x"])),
    st.tuples(st.just(b"Upgrade"), st.sampled_from([b"websocket", b"h2c"])),
    st.tuples(st.just(b"Content-Length"), st.sampled_from([b"0", b"-1", b"x", b"7", b"99999999999999999999"])),
    st.tuples(st.sampled_from([b"X-A", b"Accept", b"Cookie", b"Range", b"Host"]), _FIELD),
    st.tuples(_FIELD, _FIELD),
)


def _chunks(body: bytes, size: int, end: bytes) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + end


@st.composite
def framed(draw: st.DrawFn, body: bytes) -> tuple[bytes, bytes, bool]:
    """A header that says how long the body is, the body as it goes out, and whether the two agree."""
    how = draw(st.sampled_from(["length"] * 8 + ["chunks"] * 3 + ["gzip", "short", "long", "bad", "none"]))
    if how == "chunks":
        sent = _chunks(
            body,
            draw(st.integers(1, 50)),
            draw(st.sampled_from([b"0\r\n\r\n", b"0;a=b\r\n\r\n", b"0\r\nT: 1\r\n\r\n"])),
        )
        return b"Transfer-Encoding: chunked\r\n", sent, True
    if how == "bad":
        sent = draw(
            st.sampled_from([b"zz\r\n", b"5\r\nab\r\n", b"-1\r\n\r\n", b"ffffffffffffffffff\r\na", b"1\r\nabc\r\n"])
        )
        return b"Transfer-Encoding: chunked\r\n", sent, False
    if how == "gzip":
        packed = gzip.compress(body)
        return b"Content-Encoding: gzip\r\nContent-Length: %d\r\n" % len(packed), packed, True
    if how == "none":
        return b"", body, False
    size = len(body) + {"length": 0, "short": -1, "long": 5}[how]
    return b"Content-Length: %d\r\n" % max(0, size), body, how == "length"


_PATHS = [
    *[b"/v1/completions", b"/v1/chat/completions"] * 10,
    b"/v1/models", b"/health", b"/ready", b"/metrics", b"/suite/v1/instances", b"/", b"/v1/completions/", b"*", b"/%00",
    b"//v1/completions", b"/v1/completions?a=%ff", b"/v1/../suite/v1/instances", b"http://x/v1/models", b"/\xff", b"",
]  # fmt: skip


@st.composite
def request(draw: st.DrawFn) -> tuple[list[bytes], bool]:
    """A request in pieces, and whether its framing agrees with itself."""
    body = draw(BODY)
    length, sent, sound = draw(framed(body))
    method = draw(st.sampled_from([b"POST"] * 14 + [b"GET", b"PUT", b"HEAD", b"OPTIONS", b"CONNECT", b"P\xd6ST", b""]))
    path = draw(st.sampled_from(_PATHS))
    version = draw(st.sampled_from([b"HTTP/1.1"] * 20 + [b"HTTP/1.0", b"HTTP/2.0", b"", b"HTTP/1.1 x"]))
    extra = draw(st.lists(HEADER, max_size=3)) if draw(st.integers(0, 2)) == 0 else []
    lines = [b"Host: x\r\n", b"Connection: close\r\n", length, *(b"%b: %b\r\n" % header for header in extra)]
    head = b"%b %b %b\r\n" % (method, path, version) + b"".join(lines) + b"\r\n"
    return _pieces(draw, head + sent), sound


def _pieces(draw: st.DrawFn, whole: bytes) -> list[bytes]:
    at = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=3)))
    bounds = [0, *at, len(whole)]
    return [whole[a:b] for a, b in itertools.pairwise(bounds) if a < b]


_CHOICE = st.fixed_dictionaries(
    {}, optional={"index": _NUMBERS, "text": _TEXT, "delta": ANY_JSON, "finish_reason": ANY_JSON, "token_ids": ANY_JSON}
)
ANSWER = st.fixed_dictionaries(
    {},
    optional={
        "choices": st.lists(_CHOICE, max_size=2) | ANY_JSON,
        "usage": st.fixed_dictionaries(
            {}, optional={"prompt_tokens": _NUMBERS | ANY_JSON, "completion_tokens": ANY_JSON}
        )
        | ANY_JSON,
        "kv_transfer_params": REFERENCE | ANY_JSON,
        "error": ANY_JSON,
    },
)
_ERROR = st.builds(
    lambda code: {"error": {"message": "x", "code": code}}, st.sampled_from([400, 500, 503, "500", None, 10**30])
)
_EVENT = st.one_of(
    st.builds(lambda value: b"data: " + encoded(value) + b"\n\n", ANSWER | ANY_JSON | _ERROR),
    st.sampled_from(
        [
            b"data: [DONE]\n\n",
            b": ping\n\n",
            b"data:\n\n",
            b"\n\n",
            b"data: {\n\n",
            b"data: [DONE]",
            b"event: x\r\n\r\n",
        ]
    ),
    st.binary(max_size=10),
)


@st.composite
def upstream(draw: st.DrawFn) -> Raw:
    """Any answer of an instance: JSON or events, framed well or badly, cut anywhere."""
    if draw(st.booleans()):
        kind, body = b"application/json", draw(st.one_of(st.builds(encoded, ANSWER | ANY_JSON), st.binary(max_size=20)))
    else:
        kind, body = b"text/event-stream; charset=utf-8", b"".join(draw(st.lists(_EVENT, max_size=5)))
    length, sent, _ = draw(framed(body))
    status = draw(
        st.sampled_from(
            [b"200"] * 8
            + [b"400", b"401", b"404", b"429", b"500", b"503", b"204", b"304", b"100", b"302", b"999", b"x"]
        )
    )
    extra = draw(st.lists(HEADER, max_size=2))
    head = b"HTTP/1.1 %b X\r\nContent-Type: %b\r\n" % (status, kind) + length
    whole = head + b"".join(b"%b: %b\r\n" % header for header in extra) + b"\r\n" + sent
    if draw(st.integers(0, 4)) == 0:
        whole = whole[: draw(st.integers(0, len(whole)))]
    return Raw(_pieces(draw, whole), hold=draw(st.integers(0, 9)) == 0)
