"""One item's bytes: the data: URL taken apart, base64 checked, content hashed, header read, the part written anew."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Any, NamedTuple

import msgspec

from vllm_suite.handoff import digest
from vllm_suite.router.encode.config import Encode
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.encode.refusal import BadMedia
from vllm_suite.router.encode.sniff import measure

# A piece holds the interpreter's lock for about half a millisecond.
PIECE = 1 << 18
# What is looked at for a header: a JPEG may have a megabyte of metadata before it.
_HEAD_BYTES = 1 << 20
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]{1,64}/[A-Za-z0-9!#$&^_.+-]{1,64}(;[A-Za-z0-9=_.+\"-]{1,64}){0,4}\Z")
# vLLM's own form for a video given as frames: base64 pictures with commas between them.
_FRAMES = "video/jpeg"

_sorted = msgspec.json.Encoder(order="sorted").encode


class Scope(NamedTuple):
    """What besides its bytes decides how an item is encoded, and who may share the result.

    `factors` are the request's processor options. With any of them set vLLM makes another identifier from ours.
    """

    digest: str
    model: str | None
    factors: bool


def scope_of(document: dict[str, Any]) -> Scope:
    """The scope of a chat request."""
    model, salt = document.get("model"), document.get("cache_salt")
    options = [document.get(name) or None for name in ("mm_processor_kwargs", "media_io_kwargs")]
    name = model if isinstance(model, str) else None
    return Scope(digest("scope", _sorted([name, salt, *options])), name, any(options))


def split_data_url(url: str) -> tuple[str, str]:
    """Media type and base64 text of a data: URL. Raises `BadMedia`."""
    spec, comma, data = url[5:].partition(",")
    head, semicolon, encoding = spec.rpartition(";")
    if not comma or not semicolon or encoding != "base64":
        raise BadMedia(400, "malformed", "a data: URL must be data:<type>;base64,<data>")
    if head and not _MEDIA_TYPE.match(head):
        raise BadMedia(400, "malformed", "the media type of the data: URL is malformed")
    return head or "application/octet-stream", data


def examine(item: Item, media_type: str, data: str, settings: Encode, scope: Scope) -> None:
    """Fill in an item from its base64 text. Runs in a thread where the text is long; raises `BadMedia`."""
    frames = data.split(",") if media_type.partition(";")[0] == _FRAMES else [data]
    size = sum(len(frame) * 3 // 4 for frame in frames) - 2 * len(frames)
    if size > settings.item_bytes:
        raise BadMedia(413, "item_too_large", f"more than {settings.item_bytes} bytes")
    hasher = hashlib.sha256()
    head = b""
    item.size = 0
    for frame in frames:
        if not frame:
            raise BadMedia(400, "empty", "it has no data")
        hasher.update(len(frame).to_bytes(8, "little"))
        for start in range(0, len(frame), PIECE):
            piece = _decode(frame[start : start + PIECE], last=start + PIECE >= len(frame))
            hasher.update(piece)
            item.size += len(piece)
            if len(head) < _HEAD_BYTES:
                head += piece
    if item.size > settings.item_bytes:
        raise BadMedia(413, "item_too_large", f"more than {settings.item_bytes} bytes")
    item.media_type = media_type
    item.unit, item.units = measure(head, item.size, item.modality, settings.max_pixels)
    kind = _FRAMES if len(frames) > 1 else item.modality
    item.identity = "s-" + digest("item", kind, hasher.digest(), scope.digest)
    item.raw = _part(item, data)
    item.url = ""


def _decode(text: str, *, last: bool) -> bytes:
    try:
        piece = binascii.a2b_base64(text, strict_mode=True)
    except ValueError as exc:  # binascii.Error among them
        raise BadMedia(400, "bad_base64", "its data is not valid base64") from exc
    if not last and len(piece) * 4 != len(text) * 3:
        raise BadMedia(400, "bad_base64", "its data is not valid base64")
    return piece


def _part(item: Item, data: str) -> msgspec.Raw:
    """The part for an instance. Only checked characters go in, so nothing needs escaping."""
    url = f"data:{item.media_type.replace(chr(34), '')};base64,{data}"
    kind = "audio_url" if item.modality == "audio" else item.kind
    return msgspec.Raw(f'{{"type":"{kind}","{kind}":{{"url":"{url}"}},"uuid":"{item.identity}"}}'.encode("ascii"))


def to_base64(data: bytes) -> str:
    """Base64 text of downloaded bytes."""
    return base64.b64encode(data).decode("ascii")
