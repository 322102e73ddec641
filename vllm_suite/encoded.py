"""Wire format of encoder outputs between instances: references, and the messages of the item channel.

A producer (an instance that runs the vision or audio encoder) keeps each encoder output ("item") in a pool of its
own and serves it over one TCP port: msgpack messages behind a 4-byte length, one connection per consumer. The bytes
of an item travel by NIXL, read by the consumer from the producer's pool; the channel carries facts and leases only.
A router speaks the same channel to ask which items are still kept.

What one stage gives the next is a dictionary under vLLM's ``ec_transfer_params``, keyed by the item's identifier
(vLLM's ``mm_hash``)::

    {identifier: {"suite": <Handoff>,                     # encoded; or instead of it
                  "suite_pending": <Pending>,             # being encoded by one of these producers
                  "suite_slices": [{"suite": ...}, ...], # or each slice of it, in order
                  "metadata": {...}, "item_indices": [...]}}   # vLLM's own fields

A large item may be encoded in slices, by several producers side by side. A slice is an item of its own, with an
identifier that follows from the whole item's; see `Slice`.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_suite import frames
from vllm_suite.handoff import VERSION, Handoff, digest, same_mac

ITEM_KEY = "suite"
PENDING_KEY = "suite_pending"
ERROR_KEY = "suite_error"
SLICES_KEY = "suite_slices"  # to an encoder: {identifier of a slice: Slice}; to a consumer: a list of sources
SLICE_KEY = "suite_slice"  # in an encoder's answer: the Slice that an entry holds

MAX_SLICES = 16
MAX_MESSAGE_BYTES = 1 << 20
# Identifiers in one `Probe`: a reference takes some 600 bytes of the answer.
MAX_KEYS = 1024


class Where(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One producer that may have, or soon have, an item."""

    producer: str
    epoch: str
    host: str
    port: int


class Pending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An item that is being encoded while its request already runs.

    Attributes:
        identifier: the item's identifier on every instance.
        candidates: producers to ask, in this order; the next is asked when one fails or does not know the item.
        wait_s: seconds from the request's arrival until the consumer gives up.
        mac: HMAC-SHA256 over the other fields by whoever routed the request, "" without a fleet key.
    """

    identifier: str
    candidates: tuple[Where, ...]
    wait_s: float
    mac: str = ""

    def signed(self, key: bytes | None) -> Pending:
        """The same with its signature, or unsigned where ``key`` is None."""
        return msgspec.structs.replace(self, mac=self._mac(key) if key else "")

    def right_signature(self, key: bytes | None) -> bool:
        """Whether the signature is right, or no key is set."""
        return key is None or same_mac(self._mac(key), self.mac)

    def _mac(self, key: bytes) -> str:
        fields = [self.identifier, [list(msgspec.structs.astuple(c)) for c in self.candidates], float(self.wait_s)]
        return hmac.new(key, msgspec.json.encode(fields), hashlib.sha256).hexdigest()


class Slice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A run of the units that an item's encoder treats each for itself: tiles of a picture, frames of a film.

    How many units an item has, only a processor knows, so a slice is named by its place among equal ones.

    Attributes:
        of: the whole item's identifier.
        index, count: slice ``index``, from 0, of ``count``.
        rows: embedding rows of the whole item, in an encoder's answer; else 0.
    """

    of: str
    index: int
    count: int
    rows: int = 0

    @property
    def sound(self) -> bool:
        """Whether there can be such a slice."""
        return 0 <= self.index < self.count <= MAX_SLICES and self.count > 1 and self.rows >= 0

    def bounds(self, units: int) -> tuple[int, int]:
        """First unit, and the one behind the last."""
        return units * self.index // self.count, units * (self.index + 1) // self.count


def slice_identifier(identifier: str, index: int, count: int) -> str:
    """The identifier of one slice of an item. It says whose it is and where it belongs, and so does its reference."""
    return "s-" + digest("ec-slice", identifier, str(index), str(count))


def item_content(identifier: str) -> str:
    """The ``content`` of an item's `Handoff`."""
    return digest("ec-item", identifier)


def item_location(identifier: str, host: str, port: int) -> str:
    """The ``location`` of an item's `Handoff`."""
    return digest("ec-location", identifier, host, str(port))


@dataclass(frozen=True, slots=True)
class Producer:
    """What a producer says of itself: its life, what its items are made of, and where they are claimed."""

    producer: str
    epoch: str
    model: str
    layout: str
    host: str
    port: int

    def reference(self, identifier: str, item_id: str, rows: int, lease_s: float, key: bytes | None) -> Handoff:
        """The reference of one publication, signed where ``key`` is set."""
        return Handoff(
            version=VERSION,
            producer=self.producer,
            epoch=self.epoch,
            request_id=item_id,
            content=item_content(identifier),
            model=self.model,
            layout=self.layout,
            tokens=rows,
            location=item_location(identifier, self.host, self.port),
            claim_host=self.host,
            claim_port=self.port,
            lease_s=float(lease_s),  # signed as it is decoded: 30 and 30.0 are different text
        ).signed(key)


def hello_mac(key: bytes | None, nonce: bytes, name: str) -> bytes:
    """What proves to a producer that ``name`` knows the fleet key; empty without a key."""
    return hmac.new(key, b"ec-hello" + nonce + name.encode(), hashlib.sha256).digest() if key else b""


# --- consumer or router to producer ---


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """First message. ``mac`` is `hello_mac` over the challenge's nonce."""

    seq: int
    name: str
    mac: bytes


class Claim(msgspec.Struct, frozen=True, tag="claim", forbid_unknown_fields=True):
    """Pin one item for reading.

    Attributes:
        ref: the whole reference, or None for an item named by a `Pending`.
        producer, epoch: the life that the sender expects to answer.
        model, layout: the sender's own digests; the producer compares them with its own.
        rows: embedding rows that the sender needs.
        wait_s: how long the producer may wait for an item that it does not have yet (0: answer at once).
        hold_s: seconds the item stays pinned after the answer.
    """

    seq: int
    identifier: str
    ref: Handoff | None
    producer: str
    epoch: str
    model: str
    layout: str
    rows: int
    wait_s: float
    hold_s: float


class Release(msgspec.Struct, frozen=True, tag="release", forbid_unknown_fields=True):
    """The item has been read (``ok``), or will not be."""

    seq: int
    claim: int
    ok: bool


class Probe(msgspec.Struct, frozen=True, tag="probe", forbid_unknown_fields=True):
    """Which of these items are kept? Those that are stay for at least ``hold_s`` seconds from now."""

    seq: int
    identifiers: tuple[str, ...]
    hold_s: float


# --- producer to consumer or router ---


class Challenge(msgspec.Struct, frozen=True, tag="challenge", forbid_unknown_fields=True):
    """Sent by the producer when a connection opens."""

    nonce: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome", forbid_unknown_fields=True):
    """Answer to `Hello`: who this is, and its NIXL agent's metadata."""

    seq: int
    producer: str
    epoch: str
    model: str
    layout: str
    agent: str
    agent_metadata: bytes


class Granted(msgspec.Struct, frozen=True, tag="granted", forbid_unknown_fields=True):
    """The item is pinned. Rows are contiguous over the runs, row-major ``[rows, width]``.

    Attributes:
        claim: names this pin in `Release`.
        dtype: torch's name without the prefix, for example ``bfloat16``.
        size: bytes in all.
        seed, checksum: see ``vllm_epd.checksum``.
        runs: address and bytes of each piece of the item in the producer's memory, in order.
        memory, device: NIXL's memory kind (``DRAM`` or ``VRAM``) and device index.
        hold_s: seconds the pin lasts, as granted.
    """

    seq: int
    claim: int
    rows: int
    width: int
    dtype: str
    size: int
    seed: int
    checksum: bytes
    runs: tuple[tuple[int, int], ...]
    memory: str
    device: int
    hold_s: float


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """Answer to anything that is not granted; ``refusal`` is a `vllm_suite.handoff.Refusal` value."""

    seq: int
    refusal: str


class Kept(msgspec.Struct, frozen=True, tag="kept", forbid_unknown_fields=True):
    """Answer to `Probe`: a reference for each item that is kept."""

    seq: int
    refs: dict[str, Handoff]


Request = Hello | Claim | Release | Probe
Answer = Challenge | Welcome | Granted | Refused | Kept

request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
answer_decoder: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


async def read_frame(
    reader: asyncio.StreamReader,
    decoder: msgspec.msgpack.Decoder[Any],
    *,
    limit: int = MAX_MESSAGE_BYTES,
    idle_timeout_s: float | None = None,
    frame_timeout_s: float | None = None,
) -> Any:
    """Next message of this channel; see :func:`vllm_suite.frames.read_frame`."""
    return await frames.read_frame(
        reader, decoder, limit=limit, idle_timeout_s=idle_timeout_s, frame_timeout_s=frame_timeout_s
    )
