"""Which items a pool holds, where they lie, and which of them make room for a new one.

Nothing here locks or reads a clock: the pool does both.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from vllm_epd.tiers import Run, Tier

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
class Item:
    """A stored item and who needs it.

    Attributes:
        until: end of its lease.
        pins: end of each reader's claim.
        read: a consumer has read it under this lease.
        retired: not in the book any more; its blocks are kept for its readers.
    """

    stored: Stored
    tier: Tier
    blocks: tuple[Run, ...]
    until: float
    pins: dict[int, float] = field(default_factory=dict)
    read: bool = False
    retired: bool = False

    @property
    def count(self) -> int:
        """Blocks it takes."""
        return sum(run.blocks for run in self.blocks)


class Shelves:
    """Items by identifier, over one or more tiers; what has to leave a tier goes to the next, if it fits there."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.tiers = tuple(tiers)
        # By tier; the one that was used, or came there, longest ago first.
        self._items: dict[str, OrderedDict[str, Item]] = {tier.name: OrderedDict() for tier in tiers}
        self.evictions: Counter[str] = Counter()
        self.demotions: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(len(items) for items in self._items.values())

    def counts(self) -> dict[str, int]:
        """Items by tier."""
        return {name: len(items) for name, items in self._items.items()}

    def unread(self, now: float) -> int:
        """Items under lease that no consumer has read, and none is reading."""
        listed = (item for items in self._items.values() for item in items.values())
        return sum(not item.read and not item.pins and now < item.until for item in listed)

    def fits(self, size: int) -> bool:
        """Whether some tier could hold ``size`` bytes if it held nothing else."""
        return any(tier.blocks_for(size) <= tier.holes.count for tier in self.tiers)

    def find(self, identifier: str) -> Item | None:
        """The item, without using it."""
        for items in self._items.values():
            if (item := items.get(identifier)) is not None:
                return item
        return None

    def use(self, item: Item) -> None:
        """It is the most recently used of its tier now."""
        if not item.retired:
            self._items[item.tier.name].move_to_end(item.stored.identifier)

    def add(self, item: Item) -> None:
        """Enter an item, in the place of one of the same identifier."""
        if (old := self.find(item.stored.identifier)) is not None:
            self.take_out(old)
        self._items[item.tier.name][item.stored.identifier] = item

    def take_out(self, item: Item) -> None:
        """Out of the book; its blocks are free once nobody reads them."""
        if not item.retired:
            del self._items[item.tier.name][item.stored.identifier]
            item.retired = True
            if not item.pins:
                item.tier.holes.give(item.blocks)

    def unpin(self, item: Item, claim: int) -> None:
        """End one reader's claim."""
        del item.pins[claim]
        if item.retired and not item.pins:
            item.tier.holes.give(item.blocks)

    def place(self, size: int, now: float) -> tuple[Tier, tuple[Run, ...]] | None:
        """Blocks for a new item of ``size`` bytes, in the first tier that can have them; else None."""
        for level, tier in enumerate(self.tiers):
            blocks = self._room(level, tier.blocks_for(size), now)
            if blocks is not None:
                return tier, blocks
        return None

    def _room(self, level: int, blocks: int, now: float) -> tuple[Run, ...] | None:
        """Blocks of one tier, at the cost of items that may go. None, and nothing changed, where that is too few."""
        tier = self.tiers[level]
        if blocks > tier.holes.count:
            return None
        missing = blocks - tier.holes.free
        gone: list[Item] = []
        needed: list[Item] = []
        for item, is_needed in self._candidates(tier, now):
            if missing <= 0:
                break
            (needed if is_needed else gone).append(item)
            missing -= item.count
        if missing > 0 or not self._demote(level, needed, now):
            return None
        for item in gone:
            if not self._demote(level, [item], now):
                self.evictions[tier.name] += 1
                self.take_out(item)
        return tier.holes.take(blocks)

    def _candidates(self, tier: Tier, now: float) -> Iterator[tuple[Item, bool]]:
        """What may leave a tier, first to go first, and whether it must not be lost."""
        items = self._items[tier.name].values()
        yield from ((item, False) for item in items if not item.pins and now >= item.until)
        yield from ((item, False) for item in items if not item.pins and now < item.until and item.read)
        if tier is not self.tiers[-1]:
            yield from ((item, True) for item in items if not item.pins and now < item.until and not item.read)

    def _demote(self, level: int, items: list[Item], now: float) -> bool:
        """Move items one tier down. False, and nothing changed, where they do not fit there all."""
        if not items:
            return True
        if level + 1 == len(self.tiers):
            return False
        lower = self.tiers[level + 1]
        room = self._room(level + 1, sum(lower.blocks_for(item.stored.size) for item in items), now)
        if room is None:
            return False
        lower.holes.give(room)
        for item in items:
            self._move(item, lower)
        return True

    def _move(self, item: Item, lower: Tier) -> None:
        blocks = lower.holes.take(lower.blocks_for(item.stored.size))
        assert blocks is not None
        pieces = lower.pieces(blocks, item.stored.size)
        try:
            lower.write(pieces, item.tier.read(item.stored.runs))
        except RuntimeError:
            lower.holes.give(blocks)
            raise
        self.demotions[item.tier.name] += 1
        del self._items[item.tier.name][item.stored.identifier]
        item.tier.holes.give(item.blocks)
        item.tier, item.blocks = lower, blocks
        item.stored = replace(
            item.stored, runs=pieces, base=lower.base, memory=lower.memory, device=lower.device, tier=lower.name
        )
        self._items[lower.name][item.stored.identifier] = item
