"""Which readers hold which items of the pool, and until when."""

from __future__ import annotations

from vllm_epd.items import Item, Shelves, Stored

# Claims between two looks for those whose time is over; `put` and `take_stats` look too.
SWEEP_EVERY = 256


class Pins:
    """Claims by number, each on one item. All methods want the pool's lock held."""

    def __init__(self, shelves: Shelves) -> None:
        self._shelves = shelves
        self._items: dict[int, Item] = {}
        self._made = 0
        self.expired = 0

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: Item, now: float, hold_s: float) -> int:
        """Pin ``item`` for ``hold_s`` seconds. Returns the claim."""
        self._made += 1
        if self._made % SWEEP_EVERY == 0:  # readers that never say goodbye, where nothing is stored any more
            self.expire(now)
        item.pins[self._made] = now + hold_s
        self._items[self._made] = item
        return self._made

    def item(self, claim: int) -> Item | None:
        """What a claim pins; None once it has ended."""
        return self._items.get(claim)

    def stored(self, claim: int) -> Stored | None:
        """The publication that a claim pins."""
        item = self._items.get(claim)
        return item.stored if item is not None else None

    def end(self, claim: int, *, read: bool) -> bool:
        """``read`` says that its reader has the item. False where the claim has ended already."""
        item = self._items.pop(claim, None)
        if item is None:
            return False
        item.read = item.read or read
        self._shelves.unpin(item, claim)
        return True

    def expire(self, now: float) -> int:
        """End the claims whose time is over. Returns how many."""
        over = [(claim, item) for claim, item in self._items.items() if now >= item.pins[claim]]
        for claim, item in over:
            del self._items[claim]
            self._shelves.unpin(item, claim)
        self.expired += len(over)
        return len(over)
