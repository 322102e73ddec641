"""One call to an encoder: a chat request of media parts only, answered with a reference for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import aiohttp
import msgspec
from multidict import CIMultiDict

from vllm_suite.encoded import SLICES_KEY, Slice, item_content
from vllm_suite.handoff import Handoff, parse
from vllm_suite.router.encode.examine import Scope
from vllm_suite.router.encode.known import Encoded
from vllm_suite.router.encode.parts import Item, is_grid
from vllm_suite.router.errors import UpstreamFailure
from vllm_suite.router.members import Member
from vllm_suite.router.upstream import read_all, send

# What the client says about how media are read; everything else of its request is no business of an encoder.
_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs", "cache_salt")
_REFUSED = frozenset({400, 413, 422})
_MAX_WORDS = 512
_MAX_NUMBERS = 65_536


@dataclass(frozen=True, slots=True)
class Request:
    """What the calls of one client request have in common."""

    model: Any
    options: dict[str, Any]
    headers: CIMultiDict[str]
    scope: Scope

    @staticmethod
    def of(document: dict[str, Any], headers: CIMultiDict[str], scope: Scope) -> Request:
        """From the client's document and the headers for instances."""
        options = {name: document[name] for name in _OPTIONS if document.get(name)}
        headers = headers.copy()
        headers.popall("Accept-Encoding", None)
        return Request(document.get("model"), options, headers, scope)


class Rejected(Exception):
    """The encoder refused the request itself; its words are for the client."""


class _Entry(msgspec.Struct):
    suite: Any = None
    suite_error: str | None = None
    suite_slice: Slice | None = None
    metadata: dict[str, Any] | None = None
    item_indices: list[int] | None = None


class _Answer(msgspec.Struct):
    ec_transfer_params: dict[str, _Entry] | None = None


class _Words(msgspec.Struct):
    message: str = ""


class _Refusal(msgspec.Struct):
    error: _Words | None = None


_decode = msgspec.json.Decoder(_Answer).decode
_decode_refusal = msgspec.json.Decoder(_Refusal).decode
_encode = msgspec.json.Encoder().encode


def body(request: Request, items: Sequence[Item]) -> bytes:
    """The encoder's request: one user message with the items in order."""
    document: dict[str, Any] = {
        **request.options,
        "messages": [{"role": "user", "content": [item.wire for item in items]}],
        "max_tokens": 1,
        "stream": False,
        "temperature": 0,
        "ec_transfer_params": {"suite_encode_only": True},
    }
    slices = {item.identity: item.piece for item in items if item.piece is not None}
    if slices:
        document["ec_transfer_params"][SLICES_KEY] = slices
    if request.model is not None:
        document["model"] = request.model
    return _encode(document)


async def encode(
    session: aiohttp.ClientSession,
    member: Member,
    request: Request,
    headers: CIMultiDict[str],
    items: Sequence[Item],
    timeout_s: float,
    answer_bytes: int,
    key: bytes | None,
) -> list[Encoded | UpstreamFailure]:
    """What became of each item, in order. Items are distinct and of one modality.

    Cancelling the call closes its connection, which makes vLLM abort the request. Raises `Rejected` where the
    encoder refuses the request, `UpstreamFailure` where the call came to nothing.
    """
    response: aiohttp.ClientResponse | None = None
    try:
        async with asyncio.timeout(timeout_s):
            response = await send(session, member.chat, body(request, items), headers, "encode")
            answer = await read_all(response, answer_bytes)
    except aiohttp.ClientConnectorError as exc:
        raise UpstreamFailure("connect", "cannot connect to the encoder") from exc
    except TimeoutError as exc:  # aiohttp's connection timeout among them
        raise UpstreamFailure("timeout", "the encoder did not answer in time", status=504) from exc
    except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as exc:
        raise UpstreamFailure("disconnect", "the encoder closed the connection") from exc
    except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError) as exc:
        raise UpstreamFailure("protocol", "the encoder did not speak HTTP") from exc
    finally:
        if response is not None:
            response.close()
    if response.status in _REFUSED:
        raise Rejected(_words(answer))
    if response.status != 200:
        raise UpstreamFailure("status", "the encoder failed")
    return _read(answer, member, items, key)


def _words(answer: bytes) -> str:
    try:
        refusal = _decode_refusal(answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "the encoder refused it"
    return (refusal.error.message if refusal.error else "")[:_MAX_WORDS] or "the encoder refused it"


def _read(answer: bytes, member: Member, items: Sequence[Item], key: bytes | None) -> list[Encoded | UpstreamFailure]:
    try:
        entries = _decode(answer).ec_transfer_params
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise UpstreamFailure("protocol", "the encoder's answer is not what was asked for") from exc
    if entries is None:
        raise UpstreamFailure("no_reference", "the encoder gave no references")
    # vLLM keeps our identity as its identifier unless the request has processor options, or the model an adapter in
    # its encoder. It then makes its own, and says by position which is whose.
    by_position = {
        entry.item_indices[0]: name
        for name, entry in entries.items()
        if entry.item_indices is not None and len(entry.item_indices) == 1
    }
    plain = len(by_position) == len(entries) == len(items)
    result: list[Encoded | UpstreamFailure] = []
    for position, item in enumerate(items):
        if item.piece is not None:
            result.append(_slice(item.identity, item.piece, entries, member, key))
            continue
        name = item.identity if item.identity in entries else by_position.get(position, "") if plain else ""
        entry = entries.get(name)
        result.append(
            UpstreamFailure("no_reference", "the encoder gave no reference")
            if entry is None
            else _checked(name, entry, member, key)
        )
    return result


def _slice(
    identity: str, piece: Slice, entries: dict[str, _Entry], member: Member, key: bytes | None
) -> Encoded | UpstreamFailure:
    """What became of a slice. An encoder that could not cut the item has encoded all of it, under its own name."""
    whole = entries.get(piece.of)
    if whole is not None and identity not in entries:
        return _checked(piece.of, whole, member, key)
    entry = entries.get(identity)
    said = entry.suite_slice if entry is not None else None
    if entry is None or said is None or (said.of, said.index, said.count) != (piece.of, piece.index, piece.count):
        return UpstreamFailure("not_sliced", "the encoder gave no slice")
    encoded = _checked(identity, entry, member, key)
    return encoded._replace(of=said.rows) if isinstance(encoded, Encoded) else encoded


def _checked(identifier: str, entry: _Entry, member: Member, key: bytes | None) -> Encoded | UpstreamFailure:
    if entry.suite_error is not None:
        return UpstreamFailure("not_kept", "the encoder could not keep it")
    ref = parse(entry.suite)
    right = (
        isinstance(ref, Handoff)
        and ref.producer == member.instance_id
        and ref.content == item_content(identifier)
        and ref.check_signature(key) is None
    )
    if not isinstance(ref, Handoff) or not right:
        return UpstreamFailure("wrong_reference", "the encoder's reference is not what was asked for")
    return Encoded(identifier, ref, _placeholders(entry.metadata))


def _placeholders(metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Metadata that may stand for the media, or nothing: then the media are sent.

    vLLM does not look at these numbers before the model uses them, and a wrong kind of number ends the engine.
    """
    if not metadata:
        return {}
    for name, value in metadata.items():
        if not isinstance(value, list) or not 0 < len(value) <= _MAX_NUMBERS:
            return {}
        if not all(type(number) is int or (type(number) is float and isfinite(number)) for number in value):
            return {}
        if name.endswith("_grid_thw") and not is_grid(value):
            return {}
    return metadata
