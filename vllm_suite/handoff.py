"""The fenced reference that one stage gives the next.

A producer (prefill or encode) leaves data in its own memory and returns a :class:`Handoff`: what the data is,
who made it in which life (epoch), and how long it is kept. The consumer checks every field against its own view
of the request before it uses a single byte, then claims the lease from the producer, which alone knows whether
the memory still holds what the reference says. Anything that does not match is refused with one of
:class:`Refusal`'s reasons and computed locally.

The reference travels through clients and routers as JSON. Where a fleet key is set it is signed (HMAC-SHA256),
so that a consumer opens no connection on behalf of a reference nobody in the fleet wrote.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from enum import StrEnum
from typing import Any

import msgspec

VERSION = 1
FLEET_KEY_ENV = "VLLM_SUITE_FLEET_KEY"


class Refusal(StrEnum):
    """Why a reference was not used. The values are metric label values: a closed set."""

    UNFENCED = "unfenced"  # no fence at all: a stock producer, or somebody removed it
    MALFORMED = "malformed"  # wrong types, missing or unknown fields
    BAD_SIGNATURE = "bad_signature"  # unsigned or wrongly signed while a fleet key is set
    FOREIGN_MODEL = "foreign_model"  # another model, revision or weights layout
    FOREIGN_LAYOUT = "foreign_layout"  # another KV layout, dtype, page size or device kind
    FOREIGN_CONTENT = "foreign_content"  # made for another prompt
    TRUNCATED = "truncated"  # fewer tokens or blocks than the prompt needs
    TAMPERED = "tampered"  # differs from what the producer issued
    FOREIGN_PRODUCER = "foreign_producer"  # another instance answers at the producer's address
    STALE_EPOCH = "stale_epoch"  # the producer restarted since
    UNKNOWN = "unknown"  # the producer never issued it, or has forgotten it
    EXPIRED = "expired"  # the lease ran out
    REUSED = "reused"  # already claimed or already pulled
    CLAIM_TIMEOUT = "claim_timeout"  # the producer did not answer in time
    PEER_DEAD = "peer_dead"  # the producer failed recently and is not asked again yet
    LEASE_LOST = "lease_lost"  # claimed, but no longer surely held when its turn came
    ABANDONED = "abandoned"  # the request ended before the reference was needed
    WRONG_SHAPE = "wrong_shape"  # rows, width, dtype or byte count differ from what the request needs
    BAD_CHECKSUM = "bad_checksum"  # the bytes that arrived are not those that were made
    NON_FINITE = "non_finite"  # NaN or infinity in the data
    TOO_LARGE = "too_large"  # larger than the receiver's whole pool
    NO_ROOM = "no_room"  # the receiver's pool stayed full until the deadline
    READ_FAILED = "read_failed"  # the transfer failed or missed its deadline
    NOT_STORED = "not_stored"  # the producer made it and could not keep it

    @classmethod
    def said(cls, value: str) -> Refusal:
        """What a peer says; ``UNKNOWN`` where it is no reason of this version."""
        try:
            return cls(value)
        except ValueError:
            return cls.UNKNOWN


class Handoff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fenced reference. Every field is compared; none is advisory.

    Attributes:
        version: format of this struct.
        producer: instance id of the producer.
        epoch: the producer's life; new at each start.
        request_id: the producer's own id of the request that made the data.
        content: hex digest of what was computed (prompt tokens, images, adapter, cache salt).
        model: hex digest of model, revision, configuration and weight headers.
        layout: hex digest of memory layout, dtype and kind of device.
        tokens: prompt tokens covered.
        location: hex digest of where the data lies (block ids, agent, address).
        claim_host, claim_port: where the lease is claimed.
        lease_s: seconds the producer keeps an unclaimed lease, from the moment it issued the reference.
        mac: HMAC-SHA256 over all other fields, or "" where no fleet key is set.
    """

    version: int
    producer: str
    epoch: str
    request_id: str
    content: str
    model: str
    layout: str
    tokens: int
    location: str
    claim_host: str
    claim_port: int
    lease_s: float
    mac: str = ""

    def signed(self, key: bytes | None) -> Handoff:
        """The same reference with its signature, or unsigned where ``key`` is None."""
        return msgspec.structs.replace(self, mac=self._mac(key) if key else "")

    def check_signature(self, key: bytes | None) -> Refusal | None:
        """``BAD_SIGNATURE`` unless the signature is right or no key is set."""
        if key is None:
            return None
        return None if same_mac(self._mac(key), self.mac) else Refusal.BAD_SIGNATURE

    def _mac(self, key: bytes) -> str:
        return hmac.new(key, self.fingerprint().encode(), hashlib.sha256).hexdigest()

    def fingerprint(self) -> str:
        """Hex digest over every field but the signature; equal exactly for equal references."""
        fields = [getattr(self, name) for name in self.__struct_fields__ if name != "mac"]
        return hashlib.blake2b(msgspec.json.encode(fields), digest_size=16).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """A plain dict, for a JSON body."""
        result = msgspec.to_builtins(self)
        assert isinstance(result, dict)
        return result


def same_mac(right: str, given: str) -> bool:
    """Compared in constant time. As bytes, since `hmac` takes no text beyond ASCII, and it may come from anybody."""
    return hmac.compare_digest(right.encode(), given.encode("utf-8", "surrogatepass"))


def parse(raw: Any) -> Handoff | Refusal:
    """Read a reference that came from outside.

    Returns:
        The reference, or why it cannot be one: ``UNFENCED`` where there is nothing, ``MALFORMED`` otherwise.
    """
    if raw is None:
        return Refusal.UNFENCED
    try:
        ref = msgspec.convert(raw, Handoff, strict=True)
        # Half a surrogate pair is text to Python alone, and no fingerprint can be made of it.
        msgspec.json.encode(ref)
    except (msgspec.ValidationError, UnicodeEncodeError):
        return Refusal.MALFORMED
    sane = ref.version == VERSION and 0 < ref.claim_port < 65536 and ref.tokens >= 0 and ref.claim_host != ""
    return ref if sane else Refusal.MALFORMED


def fleet_key() -> bytes | None:
    """The fleet's signing key from the environment, or None where none is set."""
    text = os.environ.get(FLEET_KEY_ENV, "")
    return text.encode() if text else None


def digest(*parts: bytes | str) -> str:
    """Hex digest of ``parts``; each part's length is hashed too, so parts never run into each other."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()
