"""What the pool counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from vllm_epd.items import Shelves
from vllm_epd.pins import Pins


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts since the last `Pool.take_stats`, and the state then.

    Counts: hits, evictions and demotions by tier (the one it was in); not_stored by refusal; misses; stored_items,
    stored_rows and stored_bytes; pins that expired; items found corrupt.
    State: bytes used, capacity and items by tier; pins outstanding; items under lease that nobody reads or has read.
    """

    hits: dict[str, int]
    evictions: dict[str, int]
    demotions: dict[str, int]
    not_stored: dict[str, int]
    misses: int
    stored_items: int
    stored_rows: int
    stored_bytes: int
    expired_pins: int
    corrupt: int
    used_bytes: dict[str, int]
    capacity_bytes: dict[str, int]
    items: dict[str, int]
    pins: int
    unread: int


@dataclass(slots=True)
class PoolCounts:
    """Counts that are neither the shelves' nor the pins'. The pool's lock is held where they change."""

    hits: Counter[str] = field(default_factory=Counter)
    not_stored: Counter[str] = field(default_factory=Counter)
    misses: int = 0
    stored_items: int = 0
    stored_rows: int = 0
    stored_bytes: int = 0
    corrupt: int = 0

    def stats(self, shelves: Shelves, pins: Pins, now: float) -> PoolStats:
        """These counts, those of ``shelves`` and ``pins`` since they were last cleared, and the state of both."""
        return PoolStats(
            hits=dict(self.hits),
            evictions=dict(shelves.evictions),
            demotions=dict(shelves.demotions),
            not_stored=dict(self.not_stored),
            misses=self.misses,
            stored_items=self.stored_items,
            stored_rows=self.stored_rows,
            stored_bytes=self.stored_bytes,
            expired_pins=pins.expired,
            corrupt=self.corrupt,
            used_bytes={tier.name: tier.used_bytes for tier in shelves.tiers},
            capacity_bytes={tier.name: tier.capacity_bytes for tier in shelves.tiers},
            items=shelves.counts(),
            pins=len(pins),
            unread=shelves.unread(now),
        )
