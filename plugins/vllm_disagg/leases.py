"""The producer's book of leases: the one authority on whether blocks still hold what a reference says.

A lease is issued when a prefill finishes, claimed once by one consumer, renewed by it while its request waits,
and ended by exactly one of: pulled, released, expired. The scheduler frees blocks only for leases this book has
ended, so a claim that was granted covers the whole pull.

All methods take the lock; the scheduler thread and the lease server's thread share the book. ``now`` is
``time.monotonic()`` of the producer. A consumer only ever compares durations on its own clock.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from vllm_suite.handoff import Handoff, Refusal

# References that ended are remembered so that a late one is told why; older ones are "unknown".
REMEMBER_ENDED = 8192


class End(StrEnum):
    """How a lease ended. The values are metric label values."""

    PULLED = "pulled"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(slots=True)
class Lease:
    """One finished prefill whose blocks are kept.

    Attributes:
        ref: the reference as issued.
        issued: when, monotonic seconds.
        until: when it ends unless renewed.
        blocks: how many blocks it keeps, over all KV cache groups.
        holder: the consumer's nonce once claimed, else "".
        consumer: the consumer's instance id once claimed, else "".
        reading: the holder said that its pull has begun.
        ending: set once the lease has ended; the workers still have to let go.
    """

    ref: Handoff
    issued: float
    until: float
    blocks: int = 0
    holder: str = ""
    consumer: str = ""
    reading: bool = False
    ending: End | None = None


class Ended(NamedTuple):
    """What the scheduler reports about a lease whose blocks are free again."""

    end: End
    held_s: float
    blocks: int
    consumer: str


class LeaseBook:
    """Leases by the producer's request id.

    Args:
        producer: instance id, compared with each claim.
        epoch: this life of the instance.
        max_hold_s: upper bound on the age of any lease.
    """

    def __init__(self, producer: str, epoch: str, max_hold_s: float) -> None:
        self.producer = producer
        self.epoch = epoch
        self.max_hold_s = max_hold_s
        self._lock = threading.Lock()
        self._leases: dict[str, Lease] = {}
        self._to_end: dict[str, End] = {}
        self._ended: OrderedDict[str, Refusal] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def issue(self, ref: Handoff, now: float, blocks: int = 0) -> None:
        """Enter the lease of a prefill that just finished."""
        with self._lock:
            self._leases[ref.request_id] = Lease(ref, now, now + min(ref.lease_s, self.max_hold_s), blocks)

    def claim(self, ref: Handoff, holder: str, hold_s: float, now: float, consumer: str = "") -> float | Refusal:
        """Grant ``ref`` to ``holder`` for about ``hold_s`` seconds, or say why not.

        Claiming again with the same nonce is a repeat of the same message and is granted.

        Returns:
            The seconds granted, counted from ``now``; less than asked where ``max_hold_s`` cuts them.
        """
        with self._lock:
            if refusal := self._compare_producer(ref):
                return refusal
            lease = self._leases.get(ref.request_id)
            if lease is None or lease.ending is not None:
                return self._why_ended(ref.request_id, lease)
            if lease.ref.fingerprint() != ref.fingerprint():
                return Refusal.TAMPERED
            if lease.holder and lease.holder != holder:
                return Refusal.REUSED
            if now >= lease.until:
                return Refusal.EXPIRED
            lease.holder, lease.consumer = holder, consumer
            return self._extend(lease, hold_s, now)

    def renew(self, request_id: str, holder: str, hold_s: float, now: float, begin: bool = False) -> float | Refusal:
        """Extend a claim, as :meth:`claim`; refused when it is no longer this holder's.

        ``begin`` says that the holder reads from now on.
        """
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is None or lease.ending is not None:
                return self._why_ended(request_id, lease)
            if not lease.holder or lease.holder != holder:
                return Refusal.REUSED
            if now >= lease.until or now >= lease.issued + self.max_hold_s:
                return Refusal.EXPIRED
            lease.reading = lease.reading or begin
            return self._extend(lease, hold_s, now)

    def release(self, request_id: str, holder: str) -> bool:
        """End a claim early, by its holder. False when it was not this holder's to end."""
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is None or lease.ending is not None or not lease.holder or lease.holder != holder:
                return False
            lease.ending = End.RELEASED
            self._to_end[request_id] = End.RELEASED
            return True

    def expire(self, now: float) -> None:
        """End every lease whose time is over."""
        with self._lock:
            for request_id, lease in self._leases.items():
                if lease.ending is None and now >= lease.until:
                    lease.ending = End.EXPIRED
                    self._to_end[request_id] = End.EXPIRED

    def take_ended(self) -> dict[str, End]:
        """Leases ended since the last call; the caller tells the workers to let go of their blocks."""
        with self._lock:
            ended, self._to_end = self._to_end, {}
            return ended

    def freed(self, request_id: str, now: float) -> Ended | None:
        """All workers let go of the blocks. None when the request never had a lease.

        A lease that was not ended by this book was ended by the consumers' completion notices: pulled.
        """
        with self._lock:
            lease = self._leases.pop(request_id, None)
            if lease is None:
                return None
            self._to_end.pop(request_id, None)
            end = lease.ending or End.PULLED
            self._ended[request_id] = Refusal.EXPIRED if end is End.EXPIRED else Refusal.REUSED
            while len(self._ended) > REMEMBER_ENDED:
                self._ended.popitem(last=False)
            return Ended(end, now - lease.issued, lease.blocks, lease.consumer)

    def being_read(self) -> bool:
        """Some consumer's pull is under way."""
        with self._lock:
            return any(lease.reading for lease in self._leases.values())

    def next_expiry(self) -> float | None:
        """When the earliest lease ends, monotonic seconds; None without leases."""
        with self._lock:
            return min((lease.until for lease in self._leases.values()), default=None)

    def _compare_producer(self, ref: Handoff) -> Refusal | None:
        if ref.producer != self.producer:
            return Refusal.FOREIGN_PRODUCER
        return None if ref.epoch == self.epoch else Refusal.STALE_EPOCH

    def _why_ended(self, request_id: str, lease: Lease | None) -> Refusal:
        if lease is not None:
            return Refusal.EXPIRED if lease.ending is End.EXPIRED else Refusal.REUSED
        return self._ended.get(request_id, Refusal.UNKNOWN)

    def _extend(self, lease: Lease, hold_s: float, now: float) -> float:
        lease.until = max(lease.until, min(now + hold_s, lease.issued + self.max_hold_s))
        return lease.until - now
