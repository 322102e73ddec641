"""Hand-overs between instances: what they cost, how they share links, and how long their source is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

from vllm_suite.planner.models.memory import kv_bytes
from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.transfers import Transfers


class Event(IntEnum):
    """Kinds of events of a fleet, beside those of its engines (`Kind`). The end of a transfer comes before the end of a
    step at the same moment, which tells of it.
    """

    MOVED = -1
    HOP = 4
    LEASE = 5
    TICK = 6
    SWITCHED = 7


class Cost(NamedTuple):
    """Of a transfer: seconds until its first byte, seconds of its bytes at full rate, and bytes."""

    setup: float
    seconds: float
    size: float


@dataclass(slots=True, eq=False)
class Move:
    """A transfer under way, as of `since`.

    Attributes:
        setup: seconds until its first byte, which nobody shares.
        left: seconds of its bytes at full rate.
        share: of the rate.
    """

    number: int
    ends: tuple[int, int]
    setup: float
    left: float
    done: Callable[[float], None]
    since: float
    share: float = 1.0
    version: int = 0


class Links:
    """Transfers that share their instances' links.

    Processor sharing: with n transfers at one of its two instances and m at the other, a transfer goes on at the rate
    of 1 / max(n, m). What one instance leaves unused is not handed to the others of its peer, and an instance's NVLink
    and its network card are taken for one, so it is never too fast. What a transfer takes before its first byte is its
    own.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._at: dict[int, dict[int, Move]] = {}
        self._count = 0

    def start(self, source: int, target: int, cost: Cost, now: float, done: Callable[[float], None]) -> None:
        """Begin a transfer; `done(time)` follows."""
        self._count += 1
        move = Move(self._count, (source, target), cost.setup, cost.seconds, done, now)
        alone = True
        for end in move.ends:
            here = self._at.setdefault(end, {})
            here[move.number] = move
            alone = alone and len(here) == 1
        self._post(move, now)
        if not alone:
            self._share(move.ends, now)

    def _share(self, ends: tuple[int, int], now: float) -> None:
        at = self._at
        found = {**at[ends[0]], **at[ends[1]]}
        for move in found.values():
            share = 1.0 / max(len(at[move.ends[0]]), len(at[move.ends[1]]))
            if share != move.share:
                gone = now - move.since
                begun = max(0.0, gone - move.setup)
                move.setup, move.left = max(0.0, move.setup - gone), move.left - begun * move.share
                move.since, move.share = now, share
                self._post(move, now)

    def _post(self, move: Move, now: float) -> None:
        move.version += 1

        def ended(then: float, version: int) -> None:
            if version == move.version:
                self._end(move, then)

        end = now + move.setup + max(0.0, move.left) / move.share
        self.clock.post(end, Event.MOVED, move.number, move.version, ended)

    def _end(self, move: Move, now: float) -> None:
        left = 0
        for end in move.ends:
            here = self._at[end]
            del here[move.number]
            left += len(here)
        if left:
            self._share(move.ends, now)
        move.done(now)


@dataclass(frozen=True)
class Place:
    """An instance as a transfer sees it: unique number, first accelerator, and how it is cut."""

    number: int
    rank: int
    pool: PoolPlan


class Costs:
    """Seconds and bytes of transfers between instances, looked up once for each size and kind of link."""

    def __init__(self, setting: Setting) -> None:
        self._setting, self._transfers = setting, Transfers(setting.cluster)
        self._pairs: dict[tuple[int, int], int] = {}
        self._kinds: dict[Any, int] = {}
        self._known: dict[tuple[int, int], Cost] = {}

    def kv(self, source: Place, target: Place, blocks: int) -> Cost:
        """Of the cache of so many blocks of one sequence; bytes are those that the target's ranks receive."""
        pair = (source.number, target.number)
        kind = self._pairs.get(pair)
        if kind is None:
            link = self._setting.cluster.link((source.rank, target.rank))
            key = (link.gb_s, link.latency_us, source.pool.parallel, target.pool.parallel)
            kind = self._pairs[pair] = self._kinds.setdefault(key, len(self._kinds))
        known = self._known.get((kind, blocks))
        if known is None:
            known = self._known[kind, blocks] = self._kv(source, target, blocks)
        return known

    def _setup(self, source: Place, target: Place) -> float:
        return self._transfers.seconds(0.0, range(source.rank, source.rank + 1), range(target.rank, target.rank + 1))

    def _kv(self, source: Place, target: Place, blocks: int) -> Cost:
        setting, cut = self._setting, target.pool.parallel
        quant, size = target.pool.quant or setting.quant, setting.block_size
        seconds = self._transfers.kv(
            setting.model,
            quant,
            blocks * size,
            source=source.pool.parallel,
            target=cut,
            source_rank=source.rank,
            target_rank=target.rank,
            block=size,
        )
        model, tokens = setting.model, blocks * size
        held = [kv_bytes(model, quant, cut, tokens, stage=stage, block=size) for stage in range(cut.pp)]
        setup = self._setup(source, target)
        return Cost(setting.serving.pull_s + setup, seconds - setup, sum(held) * cut.tp)

    def item(self, source: Place, target: Place, size: float) -> Cost:
        """Of an encoder's output of so many bytes."""
        cuts = [(place.rank, place.pool.parallel) for place in (source, target)]
        ranks = [range(rank, rank + cut.tp * cut.pp) for rank, cut in cuts]
        setup = self._setup(source, target)
        return Cost(setup, self._transfers.seconds(size, ranks[0], ranks[1]) - setup, size)


@dataclass(slots=True, eq=False)
class Lease:
    """Blocks of a job that a prefill instance keeps until they were pulled, or until a time when nobody pulls yet."""

    job: Job
    until: float
    open: bool = True
    lost: bool = False


@dataclass(eq=False)
class Leases:
    """The leases of one prefill instance, in order of their ends. One event for all of them is under way at most."""

    clock: Clock
    number: int
    expire: Callable[[Lease, float], None]
    _book: deque[Lease] = field(default_factory=deque)
    _version: int = 0
    _posted: bool = False

    def issue(self, job: Job, now: float, hold_s: float) -> Lease:
        """Keep a job's blocks for so long."""
        lease = Lease(job, now + hold_s)
        while self._book and not self._book[0].open:
            self._book.popleft()
        self._book.append(lease)
        self._post()
        return lease

    def _post(self) -> None:
        if self._book and not self._posted:
            self._posted, self._version = True, self._version + 1
            self.clock.post(self._book[0].until, Event.LEASE, self.number, self._version, self._due)

    def _due(self, now: float, version: int) -> None:
        self._posted = False
        while self._book and (not self._book[0].open or self._book[0].until <= now):
            lease = self._book.popleft()
            if lease.open:
                lease.open, lease.lost = False, True
                self.expire(lease, now)
        self._post()
