"""The producer's cache of encoder outputs: a bounded pool of items that consumers read by NIXL.

An item is stored under its identifier, leased for ``lease_s`` from its publication, pinned by any number of readers,
and otherwise kept for as long as there is room: the least recently used goes first. Items make room in this order:
those whose lease has ended, those under lease that a consumer has read already, and, where a second tier can take
them, those under lease that nobody has read. A pinned item never moves.

The runner's thread stores, the item server's thread pins; all methods take one lock, which is never held while an
encoder's result is waited for or copied. Times are seconds of ``clock``, which is monotonic.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable

import torch

from vllm_epd.checksum import checksum, finite, flat_bytes
from vllm_epd.items import DTYPE_NAMES, DTYPES, Item, Shelves, Stored
from vllm_epd.pins import Pins
from vllm_epd.pool_stats import PoolCounts, PoolStats
from vllm_epd.tiers import Tier
from vllm_suite.handoff import Refusal

__all__ = ["DTYPES", "Listener", "Pool", "Stored"]

logger = logging.getLogger("vllm.suite.epd")

# Called with an identifier when it is stored (None) or will not be (why), from the thread that found out.
Listener = Callable[[str, Refusal | None], None]


class Pool:
    """Items by identifier.

    Args:
        slab: ``[bytes]`` uint8 on the device that the runner uses.
        block_bytes: unit of allocation.
        lease_s: how long an item is kept for sure from its publication on.
        host_slab: a second tier in host memory, for what the first one has no room for any more.
    """

    def __init__(
        self,
        slab: torch.Tensor,
        block_bytes: int,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
        host_slab: torch.Tensor | None = None,
    ) -> None:
        tiers = [Tier("device", slab, block_bytes)]
        if host_slab is not None:
            tiers.append(Tier("host", host_slab, block_bytes))
        self.lease_s = lease_s
        self.device = slab.device
        self._clock = clock
        self._lock = threading.Lock()
        self._shelves = Shelves(tiers)
        self._pins = Pins(self._shelves)
        self._published = 0
        self._listeners: list[Listener] = []
        self._counts = PoolCounts()

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` at each end of a `put` and at each `announce_failure`, outside the lock."""
        self._listeners.append(listener)

    # --- the runner's thread ---

    def put(self, identifier: str, tensor: torch.Tensor) -> Stored | Refusal:
        """Publish an encoder's output, ``[rows, width]``; its memory may be reused as soon as this returns.

        An item that is there already is published anew; who reads the old one keeps it until its pin ends.

        Returns:
            The publication, or ``WRONG_SHAPE`` (not two-dimensional, empty, another dtype), ``NON_FINITE``,
            ``TOO_LARGE`` (larger than every tier) or ``NOT_STORED`` (no room that may be taken now, or no memory).
        """
        try:
            outcome = self._put(identifier, tensor)
        except RuntimeError:  # torch's errors, out of memory among them: the item is lost, the engine is not
            logger.exception("encoder pool: %s could not be stored", identifier)
            outcome = Refusal.NOT_STORED
        with self._lock:
            if isinstance(outcome, Refusal):
                self._counts.not_stored[outcome.value] += 1
            else:
                self._counts.stored_items += 1
                self._counts.stored_rows += outcome.rows
                self._counts.stored_bytes += outcome.size
        self._tell(identifier, outcome if isinstance(outcome, Refusal) else None)
        return outcome

    def _put(self, identifier: str, tensor: torch.Tensor) -> Stored | Refusal:
        if tensor.dim() != 2 or tensor.numel() == 0 or tensor.dtype not in DTYPE_NAMES:
            return Refusal.WRONG_SHAPE
        rows, width = tensor.shape
        size = tensor.numel() * tensor.element_size()
        if not self._shelves.fits(size):
            return Refusal.TOO_LARGE
        values = tensor.detach().contiguous()
        if not finite(values):
            return Refusal.NON_FINITE
        seed = secrets.randbits(63)
        proof = checksum(values, seed)
        with self._lock:
            self._pins.expire(self._clock())
            placed = self._shelves.place(size, self._clock())
        if placed is None:
            return Refusal.NOT_STORED
        tier, blocks = placed
        pieces = tier.pieces(blocks, size)
        try:
            tier.write(pieces, flat_bytes(values))
        except RuntimeError:
            with self._lock:
                tier.holes.give(blocks)
            raise
        with self._lock:
            self._published += 1
            stored = Stored(
                identifier, f"item-{self._published}", rows, width, DTYPE_NAMES[tensor.dtype], size, seed, proof,
                pieces, tier.base, tier.memory, tier.device, tier.name,
            )  # fmt: skip
            self._shelves.add(Item(stored, tier, blocks, self._clock() + self.lease_s))
        return stored

    def announce_failure(self, identifier: str, refusal: Refusal) -> None:
        """Tell those who wait for ``identifier`` that it will not come: its encoding failed."""
        self._tell(identifier, refusal)

    def load(self, identifier: str) -> torch.Tensor | None:
        """A copy of an item, ``[rows, width]`` on the runner's device, compared with its checksum.

        None where the pool has it not, or it is not any more what was published: then it is dropped.
        """
        claimed = self.claim(identifier, self.lease_s)
        if claimed is None:
            self.count_miss()
            return None
        claim, stored = claimed
        with self._lock:
            item = self._pins.item(claim)
        if item is None:
            return None  # a lease so short that the pin has ended
        data = item.tier.read(stored.runs).to(self.device, copy=True)
        whole = checksum(data, stored.seed) == stored.checksum
        if not whole:
            self._drop_corrupt(item)
        self.unpin(claim, read=False)
        return data.view(DTYPES[stored.dtype]).view(stored.rows, stored.width) if whole else None

    # --- any thread ---

    def get(self, identifier: str) -> Stored | None:
        """The item's publication, without using it: neither its place in the order nor its lease changes."""
        with self._lock:
            item = self._shelves.find(identifier)
            return item.stored if item is not None else None

    def contains(self, identifier: str) -> bool:
        """Whether the item is there."""
        return self.get(identifier) is not None

    def __len__(self) -> int:
        return len(self._shelves)

    def keep(self, identifier: str, hold_s: float) -> Stored | None:
        """Use an item: lease it for ``hold_s`` seconds from now at least. None where it is not there."""
        with self._lock:
            item = self._shelves.find(identifier)
            if item is None:
                return None
            self._shelves.use(item)
            item.until = max(item.until, self._clock() + hold_s)
            item.read = False
            return item.stored

    def claim(self, identifier: str, hold_s: float) -> tuple[int, Stored] | None:
        """Pin an item for ``hold_s`` seconds. Any number of readers may.

        Returns:
            The claim, for `pinned` and `unpin`, and the publication that it pins. None where the item is not there.
        """
        with self._lock:
            item = self._shelves.find(identifier)
            if item is None:
                return None
            self._shelves.use(item)
            self._counts.hits[item.tier.name] += 1
            return self._pins.add(item, self._clock(), hold_s), item.stored

    def pin(self, identifier: str, hold_s: float) -> int | Refusal:
        """As `claim`; ``UNKNOWN`` where the item is not there."""
        claimed = self.claim(identifier, hold_s)
        return Refusal.UNKNOWN if claimed is None else claimed[0]

    def pinned(self, claim: int) -> Stored | None:
        """What a claim pins; None once it has ended."""
        with self._lock:
            return self._pins.stored(claim)

    def unpin(self, claim: int, *, read: bool = True) -> bool:
        """End a claim; ``read`` says that its reader has the item. False where the claim has ended already."""
        with self._lock:
            return self._pins.end(claim, read=read)

    def verify(self, claim: int) -> bool:
        """Whether the bytes of a pinned item are still those published. An item that is corrupt is dropped."""
        with self._lock:
            item = self._pins.item(claim)
        if item is None or checksum(item.tier.read(item.stored.runs), item.stored.seed) == item.stored.checksum:
            return True
        self._drop_corrupt(item)
        return False

    def drop(self, identifier: str) -> bool:
        """Forget an item; its memory is free once its readers have ended. False where it was not there."""
        with self._lock:
            item = self._shelves.find(identifier)
            if item is not None:
                self._shelves.take_out(item)
            return item is not None

    def expire(self, now: float | None = None) -> int:
        """End the pins whose time is over, as `put` does by itself. Returns how many."""
        with self._lock:
            return self._pins.expire(self._clock() if now is None else now)

    def has_published(self, item_id: str) -> bool:
        """Whether this pool has ever published under ``item_id``."""
        digits = item_id.removeprefix("item-")
        plain = item_id.startswith("item-") and digits.isascii() and digits.isdigit() and len(digits) < 20
        return plain and digits[0] != "0" and int(digits) <= self._published

    def count_miss(self) -> None:
        """Somebody asked for an item that is not there, and gave up."""
        with self._lock:
            self._counts.misses += 1

    def take_stats(self) -> PoolStats:
        """Counts since the last call, and the present state."""
        with self._lock:
            now = self._clock()
            self._pins.expire(now)
            stats = self._counts.stats(self._shelves, self._pins, now)
            self._counts = PoolCounts()
            self._shelves.evictions.clear()
            self._shelves.demotions.clear()
            self._pins.expired = 0
            return stats

    def _drop_corrupt(self, item: Item) -> None:
        logger.error("encoder pool: %s is not what was published any more; dropped", item.stored.identifier)
        with self._lock:
            self._counts.corrupt += 1
            self._shelves.take_out(item)

    def _tell(self, identifier: str, refusal: Refusal | None) -> None:
        for listener in self._listeners:
            listener(identifier, refusal)
