"""What the router remembers of items: which producer was told to keep them, under which reference."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

from vllm_suite.handoff import Handoff
from vllm_suite.router.members import Pool


class Encoded(NamedTuple):
    """One encoded item.

    `identifier` is vLLM's, mostly equal to our identity. `metadata` stands for the media where it is not empty.
    """

    identifier: str
    ref: Handoff
    metadata: dict[str, Any]

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
