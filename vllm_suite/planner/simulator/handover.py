"""Hand-overs between instances: what they cost, and how long their source is kept."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from vllm_suite.planner.models.memory import kv_bytes
from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.links import Cost
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
