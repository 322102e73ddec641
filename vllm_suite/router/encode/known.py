"""What the router remembers of items: which producer was told to keep them, under which reference."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from vllm_suite.handoff import Handoff
from vllm_suite.router.members import Pool


class Encoded(NamedTuple):
    """One encoded item.

    `identifier` is vLLM's, mostly equal to our identity. `metadata` stands for the media where it is not empty. `of`
    is not 0 where this is a slice: the rows of the whole item.
    """

    identifier: str
    ref: Handoff
    metadata: dict[str, Any]
    of: int = 0

    @property
    def producer(self) -> tuple[str, str]:
        """Instance id and epoch."""
        return self.ref.producer, self.ref.epoch


class Known:
    """Items by identity, least recently used forgotten first. Only of producers that are members in this epoch."""

    def __init__(self, limit: int, pool: Pool) -> None:
        self._limit = limit
        self._pool = pool
        self._items: OrderedDict[str, Encoded] = OrderedDict()
        self._sliced: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def get(self, identity: str) -> Encoded | None:
        """What is remembered; None, and forgotten, where its producer has left or restarted."""
        found = self._items.get(identity)
        if found is None:
            return None
        if self._pool.get(*found.producer) is None:
            del self._items[identity]
            return None
        self._items.move_to_end(identity)
        return found

    def put(self, identity: str, encoded: Encoded) -> None:
        """Remember an item, or remember it anew."""
        if self._limit == 0 or self._pool.get(*encoded.producer) is None:
            return
        self._items[identity] = encoded
        self._items.move_to_end(identity)
        while len(self._items) > self._limit:
            self._items.popitem(last=False)

    def drop(self, identity: str) -> None:
        """Forget an item that is not kept any more."""
        self._items.pop(identity, None)
        self._sliced.pop(identity, None)

    def put_sliced(self, identity: str, count: int) -> None:
        """An item is encoded in so many slices, each an item of its own."""
        self._sliced[identity] = count
        self._sliced.move_to_end(identity)
        while len(self._sliced) > self._limit:
            self._sliced.popitem(last=False)

    def slices(self, identity: str) -> int:
        """In how many slices the item was last encoded; 0 for an item that was not cut."""
        return self._sliced.get(identity, 0)
