"""What a producer answers to one message of the item channel, given its pool and its own facts. No network here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vllm_epd.pool import Pool
from vllm_suite.encoded import MAX_KEYS, Claim, Granted, Kept, Probe, Producer, Refused, item_content, item_location
from vllm_suite.frames import BadMessage
from vllm_suite.handoff import VERSION, Handoff, Refusal

# The longest that one message can pin or keep an item.
MAX_HOLD_S = 60.0


class ServerCounts(NamedTuple):
    """What happened since the last `Counts.take`; by reason where it is a mapping.

    ``released`` and ``given_up`` are claims that their holders ended, having read the item or not.
    """

    granted: int
    released: int
    given_up: int
    refused: Mapping[str, int]
    faults: Mapping[str, int]


class Counts:
    """Counters that the loop's thread raises and another reads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, label: str) -> None:
        """One more of ``name`` (``claims``, ``refused`` or ``faults``)."""
        with self._lock:
            self._counts[name, label] += 1

    def take(self) -> ServerCounts:
        """What was counted since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counter()

        def by(kind: str) -> dict[str, int]:
            return {label: number for (name, label), number in counts.items() if name == kind}

        claims = by("claims")
        ended = claims.get("granted", 0), claims.get("released", 0), claims.get("given_up", 0)
        return ServerCounts(*ended, by("refused"), by("faults"))


class Answers:
    """Answers for one pool.

    Args:
        own: facts and address of this producer.
        key: the fleet's key, or None: then references need no signature.
    """

    def __init__(self, pool: Pool, own: Producer, key: bytes | None) -> None:
        self._pool = pool
        self._own = own
        self._key = key
        self.counts = Counts()

    def claim(self, claim: Claim) -> Granted | Refused | None:
        """The answer to a claim; None where it is in order and its item is not here."""
        refusal = self._unfit(claim)
        if refusal is not None:
            return self.refuse(claim.seq, refusal)
        hold_s = within(claim.hold_s, MAX_HOLD_S)
        claimed = self._pool.claim(claim.identifier, hold_s)
        if claimed is None:
            return None
        number, stored = claimed
        if claim.rows > stored.rows:
            refusal = Refusal.TRUNCATED
        elif claim.ref is not None and claim.ref.tokens != stored.rows:
            refusal = Refusal.TAMPERED
        if refusal is not None:
            self._pool.unpin(number, read=False)
            return self.refuse(claim.seq, refusal)
        self.counts.add("claims", "granted")
        return Granted(
            seq=claim.seq,
            claim=number,
            rows=stored.rows,
            width=stored.width,
            dtype=stored.dtype,
            size=stored.size,
            seed=stored.seed,
            checksum=stored.checksum,
            runs=stored.addresses(),
            memory=stored.memory,
            device=stored.device,
            hold_s=hold_s,
        )

    def absent(self, claim: Claim) -> Refused:
        """The answer to a claim whose item is not here and is not waited for any longer."""
        self._pool.count_miss()
        # A reference that is in order shows that the item has been here.
        return self.refuse(claim.seq, Refusal.UNKNOWN if claim.ref is None else Refusal.EXPIRED)

    def probe(self, probe: Probe) -> Kept:
        """References of what is kept, and will be for the time asked.

        Raises:
            BadMessage: more identifiers than an answer has room for.
        """
        if len(probe.identifiers) > MAX_KEYS:
            raise BadMessage(f"{len(probe.identifiers)} identifiers in one probe; the limit is {MAX_KEYS}")
        hold_s = within(probe.hold_s, MAX_HOLD_S)
        refs = {}
        for identifier in probe.identifiers:
            stored = self._pool.keep(identifier, hold_s)
            if stored is not None:
                refs[identifier] = self._own.reference(identifier, stored.item_id, stored.rows, hold_s, self._key)
        return Kept(probe.seq, refs)

    def release(self, claim: int, ok: bool) -> None:
        """End a claim. One that was given up may have met wrong bytes: then nobody else shall get them."""
        if not ok:
            self._pool.verify(claim)
        if self._pool.unpin(claim, read=ok):
            self.counts.add("claims", "released" if ok else "given_up")

    def alive(self, claims: Iterable[int]) -> set[int]:
        """Those of ``claims`` that have not ended."""
        return {claim for claim in claims if self._pool.pinned(claim) is not None}

    def refuse(self, seq: int, refusal: Refusal) -> Refused:
        """A counted refusal."""
        self.counts.add("refused", refusal.value)
        return Refused(seq, refusal.value)

    def _unfit(self, claim: Claim) -> Refusal | None:
        """Why a claim cannot be meant for this producer, whatever the pool holds."""
        ref, own = claim.ref, self._own
        if claim.rows < 1:
            return Refusal.MALFORMED
        if ref is not None and (refusal := ref.check_signature(self._key)) is not None:
            return refusal
        for side in (claim,) if ref is None else (claim, ref):
            if side.producer != own.producer:
                return Refusal.FOREIGN_PRODUCER
            if side.epoch != own.epoch:
                return Refusal.STALE_EPOCH
            if side.model != own.model:
                return Refusal.FOREIGN_MODEL
            if side.layout != own.layout:
                return Refusal.FOREIGN_LAYOUT
        return None if ref is None else self._unlike_issued(claim, ref)

    def _unlike_issued(self, claim: Claim, ref: Handoff) -> Refusal | None:
        own = self._own
        if ref.content != item_content(claim.identifier):
            return Refusal.FOREIGN_CONTENT
        issued = (
            ref.version == VERSION
            and ref.location == item_location(claim.identifier, own.host, own.port)
            and (ref.claim_host, ref.claim_port) == (own.host, own.port)
            and self._pool.has_published(ref.request_id)
        )
        if not issued:
            return Refusal.TAMPERED
        return Refusal.TRUNCATED if ref.tokens < claim.rows else None


def within(seconds: float, most: float) -> float:
    """``seconds`` from outside, between 0 and ``most``; 0 for what is no number."""
    return min(seconds, most) if seconds > 0 else 0.0
