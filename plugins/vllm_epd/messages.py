"""What the scheduler's half and the workers' halves of the connector tell each other over the control link."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from vllm_suite.encoded import Pending
from vllm_suite.handoff import Handoff

# One packet holds as many messages as fit; a single one is far smaller.
MAX_PACKET = 64 << 10


class SliceSource(msgspec.Struct, frozen=True):
    """Where one slice of an item is: ``ref`` or ``pending``, exactly one of both."""

    identifier: str
    ref: Handoff | None
    pending: Pending | None


class Fetch(msgspec.Struct, frozen=True, tag="fetch"):
    """Scheduler to workers: get one item into the receive pool.

    Attributes:
        ticket: names this attempt; new for each.
        ref, pending, slices: where it is; exactly one of the three, or none for what this instance has itself.
            ``slices`` are in the order of their rows.
        rows, width: what the model needs.
        wait_s: seconds a pending item may take to be made; 0 with ``ref``.
        fetch_s: seconds all the rest may take.
    """

    ticket: int
    identifier: str
    ref: Handoff | None
    pending: Pending | None
    rows: int
    width: int
    wait_s: float
    fetch_s: float
    slices: tuple[SliceSource, ...] = ()


class Drop(msgspec.Struct, frozen=True, tag="drop"):
    """Scheduler to workers: these attempts are wanted no more, whatever state they are in."""

    tickets: tuple[int, ...]


class GaveUp(msgspec.Struct, frozen=True, tag="gave_up"):
    """Scheduler to workers: the request that would have encoded these was given up; who waits for them is told."""

    identifiers: tuple[str, ...]


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """Worker to scheduler, first message of a producer: who it is and where its items are claimed.

    The scheduler's process may have drawn another epoch where the suite was not selected by name.
    """

    producer: str
    epoch: str
    host: str
    port: int


class Saved(msgspec.Struct, frozen=True, tag="saved"):
    """Worker to scheduler: an encoder output was put into the pool, or why it was not (``refusal``)."""

    identifier: str
    refusal: str
    item_id: str
    rows: int
    size: int


class Evicted(msgspec.Struct, frozen=True, tag="evicted"):
    """Worker to scheduler: the pool keeps these no more."""

    identifiers: tuple[str, ...]


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    """Worker to scheduler: how an attempt ended; ``refusal`` is "" where the item is ready to be loaded.

    ``shares``: bytes from each producer, of an item in slices.
    """

    ticket: int
    refusal: str
    size: int
    seconds: float
    producer: str
    shares: dict[str, int] = {}


class Lost(msgspec.Struct, frozen=True, tag="lost"):
    """Worker to scheduler: an item that was ready could not be loaded; zeros stand in its place."""

    identifier: str


class Counters(msgspec.Struct, frozen=True, tag="counters"):
    """Worker to scheduler: what was counted since the last message, and gauges; see `vllm_epd.stats`."""

    counts: dict[str, dict[str, float]]
    gauges: dict[str, dict[str, float]]


ToWorker = Fetch | Drop | GaveUp
ToScheduler = Serving | Saved | Evicted | Fetched | Lost | Counters

_encoder = msgspec.msgpack.Encoder()
worker_decoder: msgspec.msgpack.Decoder[list[ToWorker]] = msgspec.msgpack.Decoder(list[ToWorker])
scheduler_decoder: msgspec.msgpack.Decoder[list[ToScheduler]] = msgspec.msgpack.Decoder(list[ToScheduler])


def packets_of(messages: Iterable[Any]) -> list[bytes]:
    """Messages as packets, in order."""
    packets: list[bytes] = []
    batch: list[msgspec.Raw] = []
    size = 0
    for message in messages:
        body = msgspec.Raw(_encoder.encode(message))
        if batch and size + len(body) > MAX_PACKET - 16:
            packets.append(_encoder.encode(batch))
            batch, size = [], 0
        batch.append(body)
        size += len(body)
    if batch:
        packets.append(_encoder.encode(batch))
    return packets
