"""The producer's cache of encoder outputs: a bounded pool of items that consumers read by NIXL.

An item is stored under its identifier, leased for ``lease_s`` from its publication, pinned by any number of readers,
and otherwise kept for as long as there is room: the least recently used goes first. Items are replaced only in this
order: those whose lease has ended, those under lease that a consumer has read already, and, where a second tier can
take them, those under lease that nobody has read. A pinned item never moves.

The runner's thread stores, the item server's thread pins; all methods take one lock, which is never held while an
encoder's result is copied or waited for. Times are seconds of ``clock``, which is monotonic.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from vllm_epd.checksum import checksum, finite, flat_bytes
from vllm_epd.tiers import Run, Tier
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.epd")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Called with an identifier when it is stored (None) or will not be (why), from the thread that found out.
Listener = Callable[[str, Refusal | None], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """One publication of an item.

    Attributes:
        item_id: new at each publication; the ``request_id`` of its reference.
        rows, width, dtype: shape of the tensor, and torch's name of its type without the prefix.
        size: bytes.
        seed, checksum: see `vllm_epd.checksum`.
        runs: offset in the tier's slab and bytes of each piece, in order.
        base: the slab's address.
        memory, device: NIXL's memory kind and device index.
        tier: the tier's name.
    """

    identifier: str
    item_id: str
    rows: int
    width: int
    dtype: str
    size: int
    seed: int
    checksum: bytes
    runs: tuple[tuple[int, int], ...]
    base: int
    memory: str
    device: int
    tier: str

    def addresses(self) -> tuple[tuple[int, int], ...]:
        """Address and bytes of each piece, in order."""
        return tuple((self.base + offset, size) for offset, size in self.runs)


@dataclass(slots=True, eq=False)
class _Item:
    """Attributes: until: end of the lease; pins: end of each pin by claim; read: a consumer has read it under this
    lease; retired: no more in the book, kept for its readers."""

    stored: Stored
    tier: Tier
    blocks: tuple[Run, ...]
    until: float
    pins: dict[int, float] = field(default_factory=dict)
    read: bool = False
    retired: bool = False

    @property
    def count(self) -> int:
        return sum(run.blocks for run in self.blocks)


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts since the last `Pool.take_stats`, and the state then.

    Counts by tier: hits, evictions, demotions out of it. By reason: not_stored. State by tier: bytes, capacity, items.
    """

    hits: dict[str, int]
    misses: int
    evictions: dict[str, int]
    demotions: dict[str, int]
    not_stored: dict[str, int]
    stored_items: int
    stored_rows: int
    stored_bytes: int
    expired_pins: int
    corrupt: int
    used_bytes: dict[str, int]
    capacity_bytes: dict[str, int]
    items: dict[str, int]
    pins: int


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
        self.lease_s = lease_s
        self.device = slab.device
        self._clock = clock
        self._lock = threading.Lock()
        self._tiers = [Tier("device", slab, block_bytes)]
        if host_slab is not None and host_slab.numel() >= block_bytes:
            self._tiers.append(Tier("host", host_slab, block_bytes))
        # By tier; the one that was used, or moved there, longest ago first.
        self._items: dict[str, OrderedDict[str, _Item]] = {tier.name: OrderedDict() for tier in self._tiers}
        self._pinned: dict[int, _Item] = {}
        self._published = 0
        self._claims = 0
        self._listeners: list[Listener] = []
        self._counts: dict[str, Counter[str]] = {}

    def subscribe(self, listener: Listener) -> None:
        """Call ``listener`` at each end of a `put` and at each `announce_failure`, outside the lock."""
        self._listeners.append(listener)

    # --- the runner's thread ---

    def put(self, identifier: str, tensor: torch.Tensor) -> Stored | Refusal:
        """Publish an encoder's output, ``[rows, width]``; its memory may be reused as soon as this returns.

        An item that is there already is published anew; who reads the old one keeps it until its pin ends.

        Returns:
            The publication, or ``WRONG_SHAPE`` (not two-dimensional, empty, another dtype), ``NON_FINITE``,
            ``TOO_LARGE`` (larger than every tier) or ``NOT_STORED`` (no room that may be taken now).
        """
        try:
            outcome = self._put(identifier, tensor)
        except RuntimeError:  # torch's errors, out of memory among them: the item is lost, the engine is not
            logger.exception("encoder pool: %s could not be stored", identifier)
            outcome = Refusal.NOT_STORED
        with self._lock:
            if isinstance(outcome, Refusal):
                self._count("not_stored", outcome.value)
            else:
                self._count("stored_items")
                self._count("stored_rows", amount=outcome.rows)
                self._count("stored_bytes", amount=outcome.size)
        self._tell(identifier, outcome if isinstance(outcome, Refusal) else None)
        return outcome

    def _put(self, identifier: str, tensor: torch.Tensor) -> Stored | Refusal:
        if tensor.dim() != 2 or tensor.numel() == 0 or tensor.dtype not in _NAMES:
            return Refusal.WRONG_SHAPE
        size = tensor.numel() * tensor.element_size()
        if all(tier.blocks_for(size) > tier.holes.count for tier in self._tiers):
            return Refusal.TOO_LARGE
        values = tensor.detach().contiguous()
        if not finite(values):
            return Refusal.NON_FINITE
        seed = secrets.randbits(63)
        proof = checksum(values, seed)
        with self._lock:
            placed = self._place(size)
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
        rows, width = tensor.shape
        with self._lock:
            self._published += 1
            stored = Stored(
                identifier, f"item-{self._published}", rows, width, _NAMES[tensor.dtype], size, seed, proof, pieces,
                tier.base, tier.memory, tier.device, tier.name,
            )  # fmt: skip
            if (old := self._find(identifier)) is not None:
                self._take_out(old)
            self._items[tier.name][identifier] = _Item(stored, tier, blocks, self._clock() + self.lease_s)
        return stored

    def announce_failure(self, identifier: str, refusal: Refusal) -> None:
        """Tell those who wait for ``identifier`` that it will not come: its encoding failed."""
        self._tell(identifier, refusal)

    def load(self, identifier: str) -> torch.Tensor | None:
        """A copy of an item, ``[rows, width]`` on the runner's device, checked against its checksum. None where the
        pool has it not, or it was found corrupt and is dropped."""
        claim = self.pin(identifier, self.lease_s)
        if isinstance(claim, Refusal):
            return None
        try:
            with self._lock:
                item = self._pinned[claim]
            data = item.tier.read(item.stored.runs).to(self.device, copy=True)
            if checksum(data, item.stored.seed) != item.stored.checksum:
                self._drop_corrupt(item)
                return None
            return data.view(DTYPES[item.stored.dtype]).view(item.stored.rows, item.stored.width)
        finally:
            self.unpin(claim, read=False)

    # --- any thread ---

    def get(self, identifier: str) -> Stored | None:
        """The item's publication, without using it: neither its place in the order nor its lease changes."""
        with self._lock:
            item = self._find(identifier)
            return item.stored if item is not None else None

    def contains(self, identifier: str) -> bool:
        """Whether the item is there."""
        return self.get(identifier) is not None

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    def keep(self, identifier: str, hold_s: float) -> Stored | None:
        """Use an item: lease it for ``hold_s`` seconds from now at least. None where it is not there."""
        with self._lock:
            item = self._find(identifier)
            if item is None:
                return None
            self._use(item)
            item.until = max(item.until, self._clock() + hold_s)
            item.read = False
            return item.stored

    def pin(self, identifier: str, hold_s: float) -> int | Refusal:
        """Pin an item for ``hold_s`` seconds. Any number of readers may.

        Returns:
            The claim, for `pinned` and `unpin`; ``UNKNOWN`` where the item is not there.
        """
        with self._lock:
            item = self._find(identifier)
            if item is None:
                self._count("misses")
                return Refusal.UNKNOWN
            self._use(item)
            self._claims += 1
            item.pins[self._claims] = self._clock() + hold_s
            self._pinned[self._claims] = item
            self._count("hits", item.tier.name)
            return self._claims

    def pinned(self, claim: int) -> Stored | None:
        """What a claim pins; None once it has ended."""
        with self._lock:
            item = self._pinned.get(claim)
            return item.stored if item is not None else None

    def unpin(self, claim: int, *, read: bool = True) -> bool:
        """End a claim; ``read`` says that its reader has the item. False where the claim has ended already."""
        with self._lock:
            item = self._pinned.get(claim)
            if item is None:
                return False
            item.read = item.read or read
            self._unpin(claim, item)
            return True

    def verify(self, claim: int) -> bool:
        """Whether the bytes of a pinned item are still those published. An item that is corrupt is dropped."""
        with self._lock:
            item = self._pinned.get(claim)
        if item is None:
            return True
        if checksum(item.tier.read(item.stored.runs), item.stored.seed) == item.stored.checksum:
            return True
        self._drop_corrupt(item)
        return False

    def drop(self, identifier: str) -> bool:
        """Forget an item; its memory is free once its readers have ended. False where it was not there."""
        with self._lock:
            item = self._find(identifier)
            if item is not None:
                self._take_out(item)
            return item is not None

    def expire(self, now: float | None = None) -> int:
        """End the pins whose time is over. Returns how many."""
        with self._lock:
            return self._expire(self._clock() if now is None else now)

    def item_number_known(self, item_id: str) -> bool:
        """Whether this pool has ever published under ``item_id``."""
        name, _, number = item_id.partition("-")
        plain = number.isascii() and number.isdigit() and len(number) < 20
        return name == "item" and plain and 0 < int(number) <= self._published and str(int(number)) == number

    def take_stats(self) -> PoolStats:
        """Counts since the last call, and the present state."""
        with self._lock:
            self._expire(self._clock())
            counts, self._counts = self._counts, {}

            def plain(name: str) -> int:
                return counts.get(name, Counter())[""]

            def labelled(name: str) -> dict[str, int]:
                return dict(counts.get(name, Counter()))

            return PoolStats(
                hits=labelled("hits"),
                misses=plain("misses"),
                evictions=labelled("evictions"),
                demotions=labelled("demotions"),
                not_stored=labelled("not_stored"),
                stored_items=plain("stored_items"),
                stored_rows=plain("stored_rows"),
                stored_bytes=plain("stored_bytes"),
                expired_pins=plain("expired_pins"),
                corrupt=plain("corrupt"),
                used_bytes={tier.name: tier.used_bytes for tier in self._tiers},
                capacity_bytes={tier.name: tier.capacity_bytes for tier in self._tiers},
                items={name: len(items) for name, items in self._items.items()},
                pins=len(self._pinned),
            )

    # --- with the lock held ---

    def _count(self, name: str, label: str = "", amount: int = 1) -> None:
        self._counts.setdefault(name, Counter())[label] += amount

    def _find(self, identifier: str) -> _Item | None:
        for items in self._items.values():
            if (item := items.get(identifier)) is not None:
                return item
        return None

    def _use(self, item: _Item) -> None:
        self._items[item.tier.name].move_to_end(item.stored.identifier)

    def _take_out(self, item: _Item) -> None:
        """Out of the book; its blocks are free once nobody reads them."""
        del self._items[item.tier.name][item.stored.identifier]
        item.retired = True
        if not item.pins:
            item.tier.holes.give(item.blocks)

    def _unpin(self, claim: int, item: _Item) -> None:
        del self._pinned[claim], item.pins[claim]
        if item.retired and not item.pins:
            item.tier.holes.give(item.blocks)

    def _expire(self, now: float) -> int:
        over = [(claim, item) for claim, item in self._pinned.items() if now >= item.pins[claim]]
        for claim, item in over:
            self._unpin(claim, item)
        self._count("expired_pins", amount=len(over))
        return len(over)

    def _place(self, size: int) -> tuple[Tier, tuple[Run, ...]] | None:
        """Blocks for a new item in the first tier that can have them."""
        self._expire(self._clock())
        for level, tier in enumerate(self._tiers):
            blocks = self._room(level, tier.blocks_for(size))
            if blocks is not None:
                return tier, blocks
        return None

    def _room(self, level: int, blocks: int) -> tuple[Run, ...] | None:
        """``blocks`` blocks of a tier at the cost of items that may go. None, and nothing changed, without enough."""
        tier = self._tiers[level]
        if blocks > tier.holes.count:
            return None
        missing, demoted, gone = blocks - tier.holes.free, list[_Item](), list[_Item]()
        for item, needed in self._candidates(tier):
            if missing <= 0:
                break
            (demoted if needed else gone).append(item)
            missing -= item.count
        if missing > 0 or not self._demote_all(level, demoted):
            return None
        for item in gone:
            if not self._demote_all(level, [item]):
                self._count("evictions", tier.name)
                self._take_out(item)
        return tier.holes.take(blocks)

    def _candidates(self, tier: Tier) -> Iterator[tuple[_Item, bool]]:
        """What may leave a tier, first to go first, and whether it must not be lost."""
        now = self._clock()
        items = self._items[tier.name].values()
        yield from ((item, False) for item in items if not item.pins and now >= item.until)
        yield from ((item, False) for item in items if not item.pins and now < item.until and item.read)
        if tier is not self._tiers[-1]:
            yield from ((item, True) for item in items if not item.pins and now < item.until and not item.read)

    def _demote_all(self, level: int, items: list[_Item]) -> bool:
        """Move items one tier down; False, and nothing changed, where they do not all fit there."""
        if not items:
            return True
        if level + 1 == len(self._tiers):
            return False
        lower = self._tiers[level + 1]
        together = self._room(level + 1, sum(item.count for item in items))
        if together is None:
            return False
        lower.holes.give(together)
        for item in items:
            self._demote(item, lower)
        return True

    def _demote(self, item: _Item, lower: Tier) -> None:
        blocks = lower.holes.take(item.count)
        assert blocks is not None
        pieces = lower.pieces(blocks, item.stored.size)
        lower.write(pieces, item.tier.read(item.stored.runs))
        self._count("demotions", item.tier.name)
        identifier = item.stored.identifier
        del self._items[item.tier.name][identifier]
        item.tier.holes.give(item.blocks)
        item.tier, item.blocks = lower, blocks
        item.stored = replace(
            item.stored, runs=pieces, base=lower.base, memory=lower.memory, device=lower.device, tier=lower.name
        )
        self._items[lower.name][identifier] = item

    # --- without the lock ---

    def _drop_corrupt(self, item: _Item) -> None:
        logger.error("encoder pool: %s is not what was published; dropped", item.stored.identifier)
        with self._lock:
            self._count("corrupt")
            if not item.retired:
                self._take_out(item)

    def _tell(self, identifier: str, refusal: Refusal | None) -> None:
        for listener in self._listeners:
            listener(identifier, refusal)
