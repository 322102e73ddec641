"""Encode instances: what runs on each, and the stage before them that looks items up and deals them out.

The stage is the router's (vllm_suite/router/encode): items that an encoder still keeps are not sent, equal items under
way are sent once, large ones are cut into slices where their encoder allows that, and the rest is spread over encoders.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vllm_suite.planner.simulator.clock import Clock, Kind
from vllm_suite.planner.simulator.routing import Member
from vllm_suite.planner.simulator.setting import Serving
from vllm_suite.planner.workload import Item

_MASK = (1 << 64) - 1

# Of an item: its content, or a number of its own below 0.
Key = int


@dataclass(slots=True, eq=False)
class Piece:
    """An item or a slice of one, for one encoder."""

    making: Making
    seconds: float
    tokens: int
    size: float
    since: float


@dataclass(eq=False)
class Making:
    """An item that is being encoded, for all who wait for it."""

    key: Key
    left: int
    waiting: list[Waiter] = field(default_factory=list)
    start: float = float("inf")
    kept: list[tuple[Encoder, float]] = field(default_factory=list)


@dataclass(eq=False)
class Waiter:
    """A request at the encode stage.

    Attributes:
        left: items that are not there yet.
        start, end: when the first of its items was begun, and when the last one was there.
        sources: encoder, bytes and key of everything that it has to fetch.
    """

    left: int
    done: Callable[[float], None]
    start: float = float("inf")
    end: float = 0.0
    sources: list[tuple[Encoder, float, Key]] = field(default_factory=list)


@dataclass(eq=False)
class Encoder(Member):
    """One encode instance: batches of at most `max_items`, first come, first served; its outputs come together.

    A batch takes the sum of its items' times: encoders are bound by operations, so items side by side win nothing.

    Attributes:
        busy, steps: seconds in batches, and batches.
        encoded, hits: items and slices that were encoded, and those that were found here.
        overflow: items that found no room beside what is yet to be fetched. They are handed over all the same.
    """

    clock: Clock | None = None
    max_items: int = 1
    ended: Callable[[Encoder, list[Piece], float], None] | None = None
    dropped: Callable[[Key], None] = lambda key: None
    budget: float = 0.0
    busy: float = 0.0
    steps: int = 0
    encoded: int = 0
    hits: int = 0
    overflow: int = 0
    waited: float = 0.0
    queue: deque[Piece] = field(default_factory=deque)
    batch: list[Piece] = field(default_factory=list)
    _version: int = 0
    _asleep: bool = True
    _kept: OrderedDict[Key, float] = field(default_factory=OrderedDict)
    _size: float = 0.0
    _pins: dict[Key, int] = field(default_factory=dict)

    def accept(self, piece: Piece, now: float) -> None:
        """A piece arrives. Pieces that arrive at one moment may share a batch."""
        assert self.clock is not None
        self.queue.append(piece)
        if self._asleep:
            self._asleep = False
            self._version += 1
            self.clock.post(now, Kind.WAKE, self.place.number, self._version, self._begin)

    def _begin(self, now: float, version: int) -> None:
        assert self.clock is not None
        queue, batch = self.queue, self.batch
        if not queue:
            self._asleep = True
            return
        total = 0.0
        while queue and len(batch) < self.max_items:
            piece = queue.popleft()
            batch.append(piece)
            total += piece.seconds
            piece.making.start = min(piece.making.start, now)
            self.waited += now - piece.since
        self.busy += total
        self.steps += 1
        self._version += 1
        self.clock.post(now + total, Kind.STEP_END, self.place.number, self._version, self._end)

    def _end(self, now: float, version: int) -> None:
        assert self.ended is not None
        batch, self.batch = self.batch, []
        self.encoded += len(batch)
        self.ended(self, batch, now)
        self._begin(now, version)

    @property
    def drained(self) -> bool:
        """Nothing is encoded or waits here, and nobody has yet to fetch anything from here."""
        return self._asleep and not self._pins

    # The token cache (plugins/vllm_epd/pool.py): a budget in bytes, least recently used out first, what is being
    # waited for or read stays.

    def keep(self, key: Key, size: float) -> bool:
        """Store an output; False where there is no room for it."""
        kept = self._kept
        if key in kept:
            self._size -= kept.pop(key)
        if size > self.budget:
            return False
        out, free = list[Key](), self.budget - self._size
        for old in kept:
            if free >= size:
                break
            if old not in self._pins:
                out.append(old)
                free += kept[old]
        if free < size:
            return False
        for old in out:
            self._size -= kept.pop(old)
            self.dropped(old)
        kept[key] = size
        self._size += size
        return True

    def has(self, key: Key) -> bool:
        """Whether an output is kept."""
        return key in self._kept

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

    def forget(self) -> None:
        """The instance gives its memory back."""
        for key in self._kept:
            self.dropped(key)
        self._kept.clear()
        self._size = 0.0


def mix(value: int) -> int:
    """splitmix64's finaliser, which turns an item and an encoder into the item's preference for it."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def slices(items: Sequence[Item], encoders: Sequence[Encoder], serving: Serving) -> list[int]:
    """Into how many slices each item is cut (vllm_suite/router/encode/slicing.py), at most its `pieces`."""
    total, result = sum(item.tokens for item in items), []
    for item in items:
        free = sum(encoder.tokens < item.tokens for encoder in encoders)
        if item.pieces < 2 or item.tokens < serving.slice_min_tokens or free < serving.min_encoders:
            result.append(1)
            continue
        fair = round(item.tokens * free / total)
        most = min(fair, free, serving.max_slices, item.tokens // serving.slice_tokens, item.pieces)
        result.append(max(1, most))
    return result


class Spread:
    """Which encoder gets which piece (vllm_suite/router/encode/spread.py): the longest first, by load or by content."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving
        self._turn = 0

    def deal(self, pieces: Sequence[tuple[Key, int]], encoders: Sequence[Encoder]) -> list[Encoder]:
        """An encoder for each piece.

        Args:
            pieces: key and tokens of each.
        """
        self._turn += 1
        load, count = [encoder.tokens for encoder in encoders], len(encoders)
        affine = self.serving.encode_policy == "cache_affinity"
        bound = self.serving.load_factor * (sum(load) + sum(tokens for _, tokens in pieces)) / count
        found: list[Encoder] = [encoders[0]] * len(pieces)
        for number in sorted(range(len(pieces)), key=lambda number: -pieces[number][1]):
            key, tokens = pieces[number]
            if affine:
                content = mix(key & _MASK)
                ranked = sorted(
                    range(count), key=lambda index: mix(content ^ mix(encoders[index].place.number + 1)), reverse=True
                )
                fits = [index for index in ranked if load[index] + tokens <= max(bound, tokens)]
                best = fits[0] if fits else min(ranked, key=load.__getitem__)
            else:
                best = min(range(count), key=lambda index: (load[index], (index - self._turn) % count))
            load[best] += tokens
            found[number] = encoders[best]
        return found


class EncodeStage:
    """The stage of one fleet.

    Args:
        seconds: of an item on an encoder of the pool.
        row_bytes: of one token of an encoder's output.
    """

    def __init__(
        self, encoders: list[Encoder], serving: Serving, seconds: Callable[[Item], float], row_bytes: float
    ) -> None:
        self.encoders, self.serving, self.seconds, self.row_bytes = encoders, serving, seconds, row_bytes
        self._spread = Spread(serving)
        self._flying: dict[Key, Making] = {}
        # Where an item is kept whole.
        self._known: dict[Key, list[tuple[Encoder, float]]] = {}
        self._own = 0

    def admit(self, items: Sequence[Item], now: float, done: Callable[[float], None]) -> Waiter:
        """Find or make the items of a request. `done(time)` follows when all are there; where `left` is 0 they are."""
        waiter, missing, seen = Waiter(0, done), list[tuple[Key, Item]](), set[Key]()
        for item in items:
            key = item.content
            if key is None:
                self._own -= 1
                key = self._own
            if key in seen:
                continue
            seen.add(key)
            if self._take(key, waiter):
                continue
            making = self._flying.get(key)
            if making is None:
                missing.append((key, item))
            else:
                waiter.left += 1
                making.waiting.append(waiter)
        if missing:
            self._send(missing, waiter, now)
        if not waiter.left:
            waiter.start = waiter.end = now
        return waiter

    def _take(self, key: Key, waiter: Waiter) -> bool:
        places = self._known.get(key)
        if places is None:
            return False
        for encoder, size in places:
            encoder.use(key)
            encoder.pin(key)
            encoder.hits += 1
            waiter.sources.append((encoder, size, key))
        return True

    def dropped(self, key: Key) -> None:
        """An encoder keeps it, or a slice of it, no more."""
        self._known.pop(key, None)

    def _send(self, missing: Sequence[tuple[Key, Item]], waiter: Waiter, now: float) -> None:
        cuts = slices([item for _, item in missing], self.encoders, self.serving)
        parts: list[tuple[Making, Item, int, int]] = []
        for (key, item), count in zip(missing, cuts, strict=True):
            making = Making(key, count, [waiter])
            self._flying[key] = making
            waiter.left += 1
            for index in range(count):
                parts.append((making, item, count, item.tokens * (index + 1) // count - item.tokens * index // count))
        chosen = self._spread.deal([(making.key, tokens) for making, _, _, tokens in parts], self.encoders)
        for (making, item, count, tokens), encoder in zip(parts, chosen, strict=True):
            encoder.charge(tokens)
            encoder.accept(Piece(making, self.seconds(item) / count, tokens, tokens * self.row_bytes, now), now)

    def ended(self, encoder: Encoder, batch: Sequence[Piece], now: float) -> None:
        """A batch is done."""
        for piece in batch:
            making = piece.making
            encoder.discharge(piece.tokens)
            making.kept.append((encoder, piece.size))
            making.left -= 1
            if not making.left:
                self._landed(making, now)

    def _landed(self, making: Making, now: float) -> None:
        key, stored = making.key, True
        del self._flying[key]
        # Slices of one item on one encoder lie there together.
        places: dict[int, tuple[Encoder, float]] = {}
        for encoder, size in making.kept:
            before = places.get(encoder.place.number, (encoder, 0.0))[1]
            places[encoder.place.number] = (encoder, before + size)
        for encoder, size in places.values():
            if not encoder.keep(key, size):
                encoder.overflow += 1
                stored = False
        if stored:
            self._known[key] = list(places.values())
        for waiter in making.waiting:
            for encoder, size in places.values():
                encoder.pin(key)
                waiter.sources.append((encoder, size, key))
            waiter.start = min(waiter.start, making.start)
            waiter.left -= 1
            if not waiter.left:
                waiter.end = now
                waiter.done(now)

    def fetched(self, waiter: Waiter) -> None:
        """A request's items were read: they may make room."""
        for encoder, _, key in waiter.sources:
            encoder.unpin(key)

    def redistribute(self, leaving: Encoder, now: float) -> None:
        """What waits at an encoder that drains goes to the others."""
        moved, leaving.queue = list(leaving.queue), deque()
        self._deal_again(moved, {id(piece): leaving for piece in moved}, now)

    def rebalance(self, now: float) -> None:
        """An encoder came: all that waits is dealt out again."""
        moved, owners = list[Piece](), dict[int, Encoder]()
        for encoder in self.encoders:
            for piece in encoder.queue:
                moved.append(piece)
                owners[id(piece)] = encoder
            encoder.queue = deque()
        self._deal_again(moved, owners, now)

    def _deal_again(self, moved: Sequence[Piece], owners: dict[int, Encoder], now: float) -> None:
        for piece in moved:
            owners[id(piece)].discharge(piece.tokens)
        if not moved:
            return
        chosen = self._spread.deal([(piece.making.key, piece.tokens) for piece in moved], self.encoders)
        for piece, encoder in zip(moved, chosen, strict=True):
            encoder.charge(piece.tokens)
            encoder.accept(piece, now)
