"""Messages over a stream: msgpack behind a 4-byte length, checked against the types that the reader expects."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec

_LENGTH = struct.Struct("!I")
_encoder = msgspec.msgpack.Encoder()


class BadMessage(ValueError):
    """The peer sent something that is no message of this channel."""


class Idle(TimeoutError):
    """Nothing came, not even the beginning of a message; the connection may be read again."""


def frame(message: msgspec.Struct) -> bytes:
    """``message`` as bytes for the wire."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


async def read_frame(
    reader: asyncio.StreamReader,
    decoder: msgspec.msgpack.Decoder[Any],
    *,
    limit: int,
    idle_timeout_s: float | None = None,
    frame_timeout_s: float | None = None,
) -> Any:
    """Next message.

    Args:
        limit: bytes of the longest message that is read.
        idle_timeout_s: how long its first byte may take; None waits for ever.
        frame_timeout_s: how long the rest may take from then on; None waits for ever.

    Raises:
        BadMessage: too long, or not what ``decoder`` expects.
        Idle: no first byte in time.
        TimeoutError: the rest of a message did not come in time.
        asyncio.IncompleteReadError: the peer closed the connection.
    """
    try:
        async with asyncio.timeout(idle_timeout_s):
            head = await reader.readexactly(1)
    except TimeoutError as error:
        raise Idle from error
    async with asyncio.timeout(frame_timeout_s):
        (length,) = _LENGTH.unpack(head + await reader.readexactly(_LENGTH.size - 1))
        if length > limit:
            raise BadMessage(f"message of {length} bytes; the limit is {limit}")
        body = await reader.readexactly(length)
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise BadMessage(str(error)) from error
