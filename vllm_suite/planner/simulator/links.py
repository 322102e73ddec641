"""Transfers that share the links of the instances at their two ends, at a cost that does not grow with their number.

Processor sharing: all transfers that an end holds back go on at one rate, so each of them ends when the end's virtual
time, which runs at that rate, has come to a number that was fixed when its first byte was sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import NamedTuple

from vllm_suite.planner.simulator.clock import Clock


class Cost(NamedTuple):
    """Of a transfer: seconds until its first byte, seconds of its bytes at full rate, and bytes."""

    setup: float
    seconds: float
    size: float


@dataclass(slots=True, eq=False)
class Move:
    """A transfer under way.

    Attributes:
        begin: when its first byte is sent; nobody shares what comes before.
        left: seconds of its bytes at full rate.
        finish: its end in the virtual time of the end that holds it back, once its first byte was sent.
        entry: of the heap entries made for it the one that counts.
    """

    number: int
    pair: _Pair
    begin: float
    left: float
    done: Callable[[float], None]
    finish: float = math.nan
    entry: int = 0


# Time or virtual time, number of the transfer, number of the entry.
_Entry = tuple[float, int, int, Move]


@dataclass(slots=True, eq=False)
class _End:
    """One instance.

    Attributes:
        count: transfers here.
        virtual: time in which a transfer with the whole link would have gone as far as one that is held back here, at
            `since`.
        setups, finishes: transfers that it holds back, before and after their first byte.
        peers: pairs that it is one end of, by the other.
        led: how many of these it holds back.
        posted: time of the event under way.
    """

    number: int
    count: int = 0
    virtual: float = 0.0
    since: float = 0.0
    setups: list[_Entry] = field(default_factory=list)
    finishes: list[_Entry] = field(default_factory=list)
    peers: dict[int, _Pair] = field(default_factory=dict)
    led: int = 0
    posted: float = math.inf
    version: int = 0

    def advance(self, now: float) -> None:
        """Up to now, while nothing else changed."""
        count = self.count
        if not count:
            self.virtual, self.since = 0.0, now
            self.setups.clear()
            self.finishes.clear()
            return
        setups = self.setups
        while setups and setups[0][0] <= now:
            begin, number, entry, move = heappop(setups)
            if entry == move.entry:
                move.finish = self.virtual + (begin - self.since) / count + move.left
                heappush(self.finishes, (move.finish, number, entry, move))
        self.virtual += (now - self.since) / count
        self.since = now

    def next(self) -> float:
        """When the first of its transfers may end, or a time before that; infinity where there is none."""
        finishes, setups, following = _fresh(self.finishes), _fresh(self.setups), math.inf
        if finishes:
            following = self.since + max(0.0, finishes[0][0] - self.virtual) * self.count
        if setups:
            # Which of several ends first is known when they have begun.
            begin, _, _, move = setups[0]
            following = min(following, begin if len(setups) > 1 else begin + move.left * self.count)
        return following

    def due(self, now: float) -> Iterator[Move]:
        """Take the transfers that have ended, up to roundings."""
        finishes, most = self.finishes, self.virtual + 8 * math.ulp(now)
        while _fresh(finishes) and finishes[0][0] <= most:
            yield heappop(finishes)[3]


def _fresh(heap: list[_Entry]) -> list[_Entry]:
    """The heap without entries at its top that count no more."""
    while heap and heap[0][2] != heap[0][3].entry:
        heappop(heap)
    return heap


class _Pair:
    """Transfers between two instances, which all have one rate: that of `slow`, the end with more transfers."""

    __slots__ = ("ends", "moves", "slow")

    def __init__(self, ends: tuple[_End, _End], slow: _End) -> None:
        self.ends, self.slow = ends, slow
        self.moves: dict[int, Move] = {}

    def other(self, end: _End) -> _End:
        """The peer of one of its ends."""
        first, second = self.ends
        return second if end is first else first


class Links:
    """Transfers that share their instances' links.

    With n transfers at one of its two instances and m at the other, a transfer goes on at the rate of 1 / max(n, m).
    What one instance leaves unused is not handed to the others of its peer, and an instance's NVLink and its network
    card are taken for one, so it is never too fast. What a transfer takes before its first byte is its own.

    Args:
        kind: of its events.
    """

    def __init__(self, clock: Clock, kind: int = -1) -> None:
        self.clock, self.kind = clock, kind
        self._ends: dict[int, _End] = {}
        self._count = 0

    def start(self, source: int, target: int, cost: Cost, now: float, done: Callable[[float], None]) -> None:
        """Begin a transfer; `done(time)` follows."""
        first, second = self._end(source, now), self._end(target, now)
        pair = first.peers.get(target)
        if pair is None:
            slow = first if first.count >= second.count else second
            pair = first.peers[target] = second.peers[source] = _Pair((first, second), slow)
            slow.led += 1
        self._count += 1
        move = Move(self._count, pair, now + cost.setup, cost.seconds, done)
        pair.moves[move.number] = move
        heappush(pair.slow.setups, (move.begin, move.number, 0, move))
        first.count += 1
        second.count += 1
        for end in pair.ends:
            if end.led < len(end.peers):
                # Those that were held back by a peer, and are by this end from now on.
                for each in [each for each in end.peers.values() if each.slow.count < end.count]:
                    self._hand(each, end, now)
        self._post(first)
        self._post(second)

    def _end(self, number: int, now: float) -> _End:
        end = self._ends.get(number)
        if end is None:
            end = self._ends[number] = _End(number)
        end.advance(now)
        return end

    def _hand(self, pair: _Pair, slow: _End, now: float) -> None:
        """Another end of a pair is the slower one."""
        before = pair.slow
        before.advance(now)
        slow.advance(now)
        before.led -= 1
        slow.led += 1
        pair.slow = slow
        for move in pair.moves.values():
            move.entry += 1
            if math.isnan(move.finish):
                heappush(slow.setups, (move.begin, move.number, move.entry, move))
            else:
                move.finish += slow.virtual - before.virtual
                heappush(slow.finishes, (move.finish, move.number, move.entry, move))

    def _post(self, end: _End) -> None:
        following = end.next()
        if following < end.posted:
            end.posted = following
            end.version += 1
            self.clock.post(following, self.kind, end.number, end.version, lambda now, version: self._due(end, version))

    def _due(self, end: _End, version: int) -> None:
        if version != end.version:
            return
        now, end.posted = self.clock.now, math.inf
        end.advance(now)
        ended, touched = list(end.due(now)), {end.number: end}
        for move in ended:
            pair = move.pair
            del pair.moves[move.number]
            for each in pair.ends:
                each.advance(now)
                each.count -= 1
                touched[each.number] = each
            if not pair.moves:
                pair.slow.led -= 1
                first, second = pair.ends
                del first.peers[second.number], second.peers[first.number]
        for each in list(touched.values()) if ended else ():
            if each.led:
                for other in [other for other in each.peers.values() if other.other(each).count > each.count]:
                    if other.slow is each:
                        slow = other.other(each)
                        self._hand(other, slow, now)
                        touched[slow.number] = slow
        for each in touched.values():
            self._post(each)
        for move in ended:
            move.done(now)
