"""Messages of the lease channel: one TCP connection per consumer and producer, framed as in :mod:`vllm_suite.frames`.

The channel carries no KV and no prompt: references, nonces and answers only. Both sides check every message
against these types; anything else closes the connection.
"""

from __future__ import annotations

import msgspec

from vllm_suite.handoff import Handoff

MAX_MESSAGE_BYTES = 64 * 1024


class Claim(msgspec.Struct, frozen=True, tag="claim", forbid_unknown_fields=True):
    """Consumer asks for a lease: the whole reference, its nonce and instance id, and for how many seconds."""

    seq: int
    ref: Handoff
    holder: str
    consumer: str
    hold_s: float


class Renew(msgspec.Struct, frozen=True, tag="renew", forbid_unknown_fields=True):
    """Consumer extends a granted claim by ``hold_s`` seconds from now; ``begin``: and now it reads."""

    seq: int
    request_id: str
    holder: str
    hold_s: float
    begin: bool = False


class Release(msgspec.Struct, frozen=True, tag="release", forbid_unknown_fields=True):
    """Consumer has no more use for a claim."""

    seq: int
    request_id: str
    holder: str


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """Consumer has pulled the blocks. A hint: NIXL's own notice frees them, this wakes an idle producer."""

    seq: int
    request_id: str
    holder: str


class Answer(msgspec.Struct, frozen=True, tag="answer", forbid_unknown_fields=True):
    """Producer's reply to message ``seq``.

    ``refusal`` is "" where granted, else a ``Refusal`` value; ``hold_s`` is what was granted, counted from the
    producer's receipt of the message.
    """

    seq: int
    refusal: str = ""
    hold_s: float = 0.0


Request = Claim | Renew | Release | Done

request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
