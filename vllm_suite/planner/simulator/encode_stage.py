"""The stage before the encoders that looks items up and deals them out: the router's (vllm_suite/router/encode).

Items that an encoder still keeps are not sent, equal items under way are sent once, large ones are cut into slices
where their encoder allows that, and the rest is spread over encoders.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from vllm_suite.planner.simulator.encoders import Encoder, Making, Piece, Waiter
from vllm_suite.planner.simulator.setting import Serving
from vllm_suite.planner.simulator.token_cache import Key
from vllm_suite.planner.workload import Item

_MASK = (1 << 64) - 1


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
            waiter.keys.append(key)
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
            encoder.cache.use(key)
            encoder.cache.pin(key)
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
            if not encoder.cache.keep(key, size):
                encoder.overflow += 1
                stored = False
        if stored:
            self._known[key] = list(places.values())
        for waiter in making.waiting:
            for encoder, size in places.values():
                encoder.cache.pin(key)
                waiter.sources.append((encoder, size, key))
            waiter.start = min(waiter.start, making.start)
            waiter.left -= 1
            if not waiter.left:
                waiter.end = now
                waiter.done(now)
            if waiter.landed is not None:
                waiter.landed(now)

    def fetched(self, waiter: Waiter) -> None:
        """A request's items were read: they may make room."""
        for encoder, _, key in waiter.sources:
            encoder.cache.unpin(key)

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
