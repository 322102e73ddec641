"""The media parts of a chat request, found as vLLM's parser would find them.

vLLM goes by a part's `type` where it has no `uuid`, and by the keys in it otherwise. A part that the two rules read
differently could show the router one thing and the engine another, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from vllm_suite.encoded import Slice
from vllm_suite.router.encode.config import Modality
from vllm_suite.router.encode.refusal import BadMedia, MediaRefused

TEXT_TYPES = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"})
MEDIA_KINDS: dict[str, Modality] = {
    "image_url": "image",
    "audio_url": "audio",
    "input_audio": "audio",
    "video_url": "video",
}
EMBEDS_KINDS: dict[str, Modality] = {"image_embeds": "image", "audio_embeds": "audio", "video_embeds": "video"}
# Keys that make vLLM take a part for media whatever its type says.
MEDIA_KEYS = frozenset({*MEDIA_KINDS, *EMBEDS_KINDS, "image_pil", "prompt_embeds"})


_MAX_SIDE = 1 << 20


@dataclass(slots=True)
class Item:
    """One media part with raw media.

    Attributes:
        index: position among the request's media parts.
        kind: the part's type; modality: what the model takes it for.
        message, part: position in the document.
        url: what the client gave, "" once `raw` is made. `input_audio` becomes a data: URL.
        media_type: from the data: URL or the download.
        size: decoded bytes. units, unit: the measure of its encoding cost, see `sniff`.
        identity: "s-" and 32 hex digits: equal exactly for what encodes to the same embeddings.
        raw: the part as JSON for an instance, its data as data: URL and its identity as uuid.
        tokens: estimated or remembered embedding rows.
        whole, piece: of a slice, the item that it is of and its place in it. It has no `raw` of its own.
    """

    index: int
    kind: str
    modality: Modality
    message: int
    part: int
    url: str
    media_type: str = ""
    size: int = 0
    units: float = 0.0
    unit: str = "bytes"
    identity: str = ""
    raw: msgspec.Raw = field(default_factory=lambda: msgspec.Raw(b"null"))
    tokens: int = 1
    whole: Item | None = None
    piece: Slice | None = None

    @property
    def wire(self) -> msgspec.Raw:
        """The part for an encoder. One with a slice's name is made when it is sent: the data may be long."""
        if self.whole is None:
            return self.raw
        data = bytes(self.whole.raw)
        name = self.whole.identity.encode()
        at = data.rindex(name)
        return msgspec.Raw(b"".join((data[:at], self.identity.encode(), data[at + len(name) :])))

    @property
    def prompt_tokens(self) -> int:
        """Rows of its placeholder in an encoder's prompt: those of the whole item, also for a slice."""
        return self.tokens if self.whole is None else self.whole.tokens

    @property
    def name(self) -> str:
        """For messages to the client."""
        return f"item {self.index} ({self.kind})"

    @property
    def where(self) -> str:
        """The part's place in the body."""
        return f"messages[{self.message}].content[{self.part}]"

    def refused(self, bad: BadMedia) -> MediaRefused:
        """The refusal of the whole request on this item's account."""
        return MediaRefused(bad.status, bad.reason, f"{self.name}: {bad}", self.where)


@dataclass(slots=True)
class Found:
    """The media of a document: items to encode, and how many parts bring embeddings, by modality."""

    items: list[Item]
    embeds: dict[Modality, int]
    count: int


def content_parts(document: dict[str, Any]) -> Iterator[tuple[int, int, list[Any], dict[str, Any]]]:
    """Message index, part index, the list that holds the part, and the part, for each part that is an object."""
    messages = document.get("messages")
    for m, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            for p, part in enumerate(content):
                if isinstance(part, dict):
                    yield m, p, content, part


def is_media(part: Any) -> bool:
    """Whether a content part may be anything but text; cheap, and never False for media."""
    if not isinstance(part, dict):
        return False
    kind = part.get("type", "text")
    return not isinstance(kind, str) or kind not in TEXT_TYPES or not MEDIA_KEYS.isdisjoint(part)


def find_media(document: dict[str, Any], max_items: int) -> Found:
    """All media of a chat request in order. Takes client uuids off parts with embeddings, in place.

    Raises `MediaRefused` for parts that are ambiguous, of an unknown kind, empty, or too many.
    """
    found = Found([], {}, 0)
    for m, p, content, part in content_parts(document):
        if not is_media(part):
            continue
        item = Item(found.count, str(part.get("type") or "no type")[:32], "image", m, p, "")
        try:
            kind, value = _read(part)
            if kind is None:
                continue
            item.kind = kind
            if kind in MEDIA_KINDS:
                item.modality = MEDIA_KINDS[kind]
                item.url = _url(kind, value)
                found.items.append(item)
            elif kind in EMBEDS_KINDS:
                _check_embeds(value)
                modality = EMBEDS_KINDS[kind]
                found.embeds[modality] = found.embeds.get(modality, 0) + 1
                if "uuid" in part:
                    # Under another item's uuid these embeddings would be taken for that item's.
                    content[p] = {key: value for key, value in part.items() if key != "uuid"}
        except BadMedia as bad:
            raise item.refused(bad) from bad
        found.count += 1
        if found.count > max_items:
            raise MediaRefused(400, "too_many_items", f"more than {max_items} media parts in one request")
    return found


def _read(part: dict[str, Any]) -> tuple[str | None, Any]:
    """Kind and value; None for text after all."""
    # With a uuid vLLM goes by keys alone, and takes an empty one for "the item that you know under this uuid".
    named = part.get("uuid") is not None
    keys = sorted(key for key in MEDIA_KEYS if key in part and (named or part[key] is not None))
    kind = part.get("type")
    if kind is None:
        if not keys:
            return None, None  # vLLM words what it thinks of a part without a type
        kind = keys[0]
    if not isinstance(kind, str):
        raise BadMedia(400, "unsupported", "its type is not a string")
    if kind in TEXT_TYPES:
        if keys:
            raise BadMedia(400, "ambiguous", f"a {kind} part with {', '.join(keys)}")
        return None, None
    if kind == "input_image":
        kind = "image_url"
    if kind == "prompt_embeds":
        if keys not in ([], ["prompt_embeds"]):
            raise BadMedia(400, "ambiguous", f"a {kind} part with {', '.join(keys)}")
        return kind, None
    if kind not in MEDIA_KINDS and kind not in EMBEDS_KINDS:
        raise BadMedia(400, "unsupported", "this kind of content part is not supported")
    if keys not in ([], [kind]):
        raise BadMedia(400, "ambiguous", f"a {kind} part with {', '.join(keys)}")
    if part.get(kind) is None:
        raise BadMedia(400, "empty", "it has no data; items are not looked up by a client's uuid")
    return kind, part[kind]


def _url(kind: str, value: Any) -> str:
    if kind == "input_audio":
        data = value.get("data") if isinstance(value, dict) else None
        form = value.get("format") if isinstance(value, dict) else None
        if not isinstance(data, str) or not isinstance(form, str):
            raise BadMedia(400, "malformed", "input_audio needs data and format")
        return f"data:audio/{form};base64,{data}"
    url = value.get("url") if isinstance(value, dict) else value
    if not isinstance(url, str) or not url:
        raise BadMedia(400, "malformed", "it has no url")
    return url


def is_grid(value: Any) -> bool:
    """Whether this is one item's grid as models read it: three positive whole numbers."""
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(type(number) is int and 0 < number < _MAX_SIDE for number in value)
    )


def _check_embeds(value: Any) -> None:
    """Embeddings have a tensor in them: a part with placeholders only would name what somebody else had encoded.

    Numbers outside tensors reach the model unchecked by vLLM, and a malformed grid ends the engine; so only
    well-formed grids pass.
    """
    tensors = value.values() if isinstance(value, dict) else (value,)
    if not any(isinstance(tensor, str) and tensor for tensor in tensors):
        raise BadMedia(400, "empty", "it has no embeddings")
    for name, inner in value.items() if isinstance(value, dict) else ():
        if not isinstance(inner, str) and not (name.endswith("_grid_thw") and is_grid(inner)):
            raise BadMedia(400, "malformed", f"its field {str(name)[:32]!r} is no tensor and no well-formed grid")
