"""An encoder's cache of its outputs (plugins/vllm_epd/pool.py): a budget in bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

# Of an item: its content, or a number of its own below 0.
Key = int


class TokenCache:
    """What one encoder keeps. What somebody has yet to read stays whatever comes.

    Args:
        budget: bytes.
        dropped: called with what makes room.
    """

    def __init__(self, budget: float, dropped: Callable[[Key], None]) -> None:
        self.budget, self.dropped = budget, dropped
        self.size = 0.0
        self._kept: OrderedDict[Key, float] = OrderedDict()
        self._pins: dict[Key, int] = {}

    @property
    def read(self) -> bool:
        """Whether nothing is yet to be read."""
        return not self._pins

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def keep(self, key: Key, size: float) -> bool:
        """Store an output; False where there is no room for it."""
        kept = self._kept
        if key in kept:
            self.size -= kept.pop(key)
        if size > self.budget:
            return False
        out, free = list[Key](), self.budget - self.size
        for old in kept:
            if free >= size:
                break
            if old not in self._pins:
                out.append(old)
                free += kept[old]
        if free < size:
            return False
        for old in out:
            self.size -= kept.pop(old)
            self.dropped(old)
        kept[key] = size
        self.size += size
        return True

    def use(self, key: Key) -> None:
        """It is asked for again: it goes last from now on."""
        self._kept.move_to_end(key)

    def pin(self, key: Key) -> None:
        """Somebody is to read it."""
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: Key) -> None:
        """Somebody has read it."""
        left = self._pins[key] - 1
        if left:
            self._pins[key] = left
        else:
            del self._pins[key]

    def clear(self) -> None:
        """The instance gives its memory back."""
        for key in self._kept:
            self.dropped(key)
        self._kept.clear()
        self.size = 0.0
