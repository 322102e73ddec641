"""What the consumer's scheduler knows of each item that it fetches or has refused; no vLLM, no network.

An item is fetched once however many requests and ranks want it. It is ready when every rank has it, and failed when
any rank has not. A failure belongs to the requests that named the same source: another request's better reference
starts an attempt of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_suite.handoff import Refusal


@dataclass(slots=True)
class Item:
    """One attempt to get an item.

    Attributes:
        ticket: names the attempt towards the workers.
        source: what the attempt relies on; equal for equal references.
        until: own monotonic time after which workers that still have not answered are given up.
        pending: the item was still to be made when the attempt began.
        wanted_by: requests that wait for it or will load it.
        missing: ranks that have not answered.
        size, seconds, producer: of the slowest rank, once ready; ``size`` is the sum over ranks.
        shares: for an item in slices, ``size`` by producer.
    """

    identifier: str
    ticket: int
    source: str
    rows: int
    until: float
    pending: bool
    wanted_by: set[str]
    missing: set[int]
    size: int = 0
    seconds: float = 0.0
    producer: str = ""
    shares: Counter[str] = field(default_factory=Counter)

    @property
    def ready(self) -> bool:
        return not self.missing


@dataclass(frozen=True, slots=True)
class Settled:
    """An attempt that has ended on every rank, or has failed on one."""

    item: Item
    refusal: Refusal | None


@dataclass(slots=True)
class Ledger:
    """Items by identifier, and each request's refusals.

    Args:
        ranks: every rank that must have an item before it may be used.
    """

    ranks: frozenset[int]
    _items: dict[str, Item] = field(default_factory=dict)
    _by_ticket: dict[int, Item] = field(default_factory=dict)
    _wants: dict[str, dict[str, str]] = field(default_factory=dict)  # request -> identifier -> source
    _refused: dict[str, dict[str, Refusal]] = field(default_factory=dict)  # request -> identifier -> why
    _tickets: int = 0

    # --- a request's view ---

    def get(self, identifier: str) -> Item | None:
        return self._items.get(identifier)

    def ready(self, identifier: str) -> bool:
        item = self._items.get(identifier)
        return item is not None and item.ready

    def refusal(self, request_id: str, identifier: str) -> Refusal | None:
        """Why this request cannot have the item from elsewhere, or None while it still may."""
        return self._refused.get(request_id, {}).get(identifier)

    def refuse(self, request_id: str, identifier: str, refusal: Refusal) -> None:
        """Remember that this request's source for the item is of no use."""
        self._refused.setdefault(request_id, {})[identifier] = refusal

    def start(self, request_id: str, identifier: str, source: str, rows: int, until: float, pending: bool) -> Item:
        """A new attempt; the item must have none."""
        assert identifier not in self._items
        self._tickets += 1
        item = Item(identifier, self._tickets, source, rows, until, pending, {request_id}, set(self.ranks))
        self._items[identifier] = item
        self._by_ticket[item.ticket] = item
        self._wants.setdefault(request_id, {})[identifier] = source
        return item

    def join(self, request_id: str, item: Item, source: str) -> None:
        """One more request waits for the item; ``source`` is its own, "" where it named none."""
        item.wanted_by.add(request_id)
        self._wants.setdefault(request_id, {}).setdefault(item.identifier, source)

    def take(self, identifier: str) -> Item:
        """The item goes to the runner: its attempt is over and nobody waits for it any more."""
        return self._close(self._items[identifier])

    def leave(self, request_id: str) -> list[int]:
        """The request is over. Returns the tickets of attempts that nobody wants any more."""
        self._refused.pop(request_id, None)
        unwanted = []
        for identifier in self._wants.pop(request_id, ()):
            item = self._items.get(identifier)
            if item is None:
                continue
            item.wanted_by.discard(request_id)
            if not item.wanted_by:
                self._close(item)
                unwanted.append(item.ticket)
        return unwanted

    # --- the workers' answers ---

    def answered(
        self,
        rank: int,
        ticket: int,
        refusal: Refusal | None,
        size: int = 0,
        seconds: float = 0.0,
        producer: str = "",
        shares: Mapping[str, int] | None = None,
    ) -> Settled | None:
        """One rank's end of an attempt; the attempt's own end where it is that."""
        item = self._by_ticket.get(ticket)
        if item is None or rank not in item.missing:
            return None  # an attempt that was given up, or an answer given twice
        if refusal is not None:
            return self._fail(item, refusal)
        item.missing.discard(rank)
        item.size += size
        item.seconds = max(item.seconds, seconds)
        item.producer = item.producer or producer
        item.shares.update(shares or {})
        return Settled(item, None) if item.ready else None

    def overdue(self, now: float) -> list[Settled]:
        """Give up attempts on which some rank has said nothing past the time for it."""
        late = [item for item in self._items.values() if item.missing and now > item.until]
        return [self._fail(item, Refusal.READ_FAILED) for item in late]

    def fail_all(self) -> list[Settled]:
        """The link to a worker is gone: no attempt can end well."""
        return [self._fail(item, Refusal.READ_FAILED) for item in list(self._items.values())]

    @property
    def fetching(self) -> bool:
        return any(item.missing for item in self._items.values())

    def next_deadline(self) -> float | None:
        return min((item.until for item in self._items.values() if item.missing), default=None)

    def __len__(self) -> int:
        return len(self._items)

    def _fail(self, item: Item, refusal: Refusal) -> Settled:
        for request_id in item.wanted_by:
            own = self._wants.get(request_id, {}).pop(item.identifier, "")
            if own in ("", item.source):
                self.refuse(request_id, item.identifier, refusal)
        self._close(item)
        return Settled(item, refusal)

    def _close(self, item: Item) -> Item:
        del self._items[item.identifier], self._by_ticket[item.ticket]
        return item
