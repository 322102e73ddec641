"""Engines as members of a fleet: with counts of their cache, encoding of their own, and pulls before they decode."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.jobs import Choosing, FirstCome, Job, Learner, Reserving, WaitingQueue
from vllm_suite.planner.simulator.step_sources import OwnEncoder
from vllm_suite.planner.workload import Item


@dataclass(slots=True, eq=False)
class Leg(Job):
    """A request on one instance.

    Attributes:
        flight: the fleet's own record of the request.
        items: that this instance has to encode itself.
        remote: its keys and values lie on a prefill instance, and the pull has not begun.
        reserved: blocks that a pull fills or has filled.
        pending: items that are still under way, by their place: tokens before it, those up to its end, and its key.
    """

    flight: Any = None
    items: tuple[Item, ...] = ()
    remote: bool = False
    reserved: int = 0
    pending: tuple[tuple[int, int, int], ...] = ()


class Hosted(Engine):
    """An engine of a pool, which counts how full its cache is.

    Attributes:
        pool: which.
        peak: most blocks taken, at most by a rounding more than there were.
        seen: seconds up to which its cache is counted; when it began, at first.
    """

    pool: PoolPlan
    peak = 0
    seen = 0.0
    _area = _growth = 0.0
    _used = 0

    def tally(self, now: float) -> float:
        """Block-seconds taken up to now. While jobs decode their caches are taken to grow evenly."""
        since = now - self.seen
        self._area += (self._used + self._growth / 2 * since) * since
        self.seen = now
        return self._area

    def release(self, blocks: int, now: float, job: Job | None = None) -> None:
        """See `Engine`."""
        self.tally(now)
        free = self.free
        super().release(blocks, now, job)
        # What a run under way has taken since its start is not known here: growth begins anew from what it had.
        self._used -= self.free - free

    def _schedule(self, now: float) -> None:
        if self._pipeline is not None:
            # Several batches are under way; `_proceed` is not in use then.
            self.tally(now)
        super()._schedule(now)
        if self._pipeline is not None:
            self._used = used = self.limits.blocks - self.free
            self.peak = max(self.peak, used)

    def _proceed(self, now: float) -> None:
        since, blocks = now - self.seen, self.limits.blocks
        self._area += (self._used + self._growth / 2 * since) * since
        self.seen = now
        super()._proceed(now)
        self._used = most = blocks - self.free
        run, self._growth = self._flight, 0.0
        # A single step that was planned ahead has taken its blocks by now, a run takes them as it goes on.
        if run is not None and run.line is not None and run.sampled is None:
            # Every step of the run is taken to be as long as its first.
            jobs, size = self.decoding.count, self.limits.block_size
            if run.seconds > 0:
                self._growth = jobs / size / run.seconds
            most += -(-self._count * jobs // size)
        if most > self.peak:
            self.peak = min(most, blocks)

    def _post_mixed(self, now: float) -> None:
        source = self.source
        if isinstance(source, OwnEncoder):
            source.extra = sum(
                source.chunk(job, job.items, tokens)
                for job, tokens in self._chunks
                if isinstance(job, Leg) and job.items and not job.preemptions
            )
        super()._post_mixed(now)


class HeadOfLine(WaitingQueue):
    """A decode instance's queue. Jobs whose pull has ended come first, as vLLM takes requests that hold blocks first.

    Attributes:
        inner: the others, in their own order.
        ready: those whose pull has ended.
        local: only what needs no pull is shown: nobody overtakes a remote job at the head of the others.
    """

    def __init__(self, inner: WaitingQueue) -> None:
        self.inner = inner
        self.ready: deque[Leg] = deque()
        self.local = False
        self._learner = inner if isinstance(inner, Learner) else None
        self._now = 0.0

    def remote(self, now: float) -> Leg | None:
        """The head of the others, where it has yet to be pulled."""
        self._now = now
        head = self.inner.peek(now) if len(self.inner) else None
        return head if isinstance(head, Leg) and head.remote else None

    def push(self, job: Job, now: float) -> None:
        """See `WaitingQueue`."""
        self.inner.push(job, now)

    def push_back(self, job: Job, now: float) -> None:
        """See `WaitingQueue`."""
        self.inner.push_back(job, now)

    def peek(self, now: float) -> Job:
        """See `WaitingQueue`; without the ready ones, which the instance admits itself."""
        return self.inner.peek(now)

    def pop(self, now: float) -> Job:
        """See `WaitingQueue`."""
        return self.inner.pop(now)

    def left(self, job: Job, now: float) -> None:
        """See `Learner`."""
        if self._learner is not None:
            self._learner.left(job, now)

    def __len__(self) -> int:
        if self.local:
            return 0 if self.remote(self._now) is not None else len(self.inner)
        return len(self.ready) + len(self.inner)


# Starts the pull of a leg into so many blocks; False where the prefill instance has given its blocks up.
Puller = Callable[[Leg, int, float], bool]


class Receiving(Hosted):
    """A decode instance: a job that was prefilled elsewhere gets all its blocks, then its pull begins, then it runs.

    As in vLLM's scheduler a pull begins where a waiting request could be admitted: in a step that preempted nobody and
    has budget and a free place among the running. Its blocks are held from then on (`kept`, until it is admitted);
    during the pull it takes no place and no budget. With prefix caching what is found here is not pulled.

    Attributes:
        pulling: jobs whose pull is under way.
    """

    pull: Puller
    pulling = 0

    def __init__(self, *args: Any, waiting: WaitingQueue | None = None, **more: Any) -> None:
        """As `Engine`."""
        self.line = HeadOfLine(FirstCome() if waiting is None else waiting)
        super().__init__(*args, waiting=self.line, **more)
        inner = self.line.inner
        self._reserving = inner if isinstance(inner, Reserving) else None
        self._choosing = inner if isinstance(inner, Choosing) and inner.chooses else None

    def pulled(self, leg: Leg, now: float) -> None:
        """A pull ended."""
        self.pulling -= 1
        self.line.ready.append(leg)
        self._awake(now)

    def _schedule(self, now: float) -> None:
        preempted = self.preemptions
        super()._schedule(now)
        if self._idle and self.preemptions > preempted:
            # The last of the running made way for itself: the next step may admit it, whatever pulls hold.
            self._awake(now)

    def _admit(self, now: float, budget: int, available: int) -> None:
        line, most = self.line, self.limits.max_num_seqs
        while line.ready and budget > 0 and len(self.running) < most:
            budget -= self._enter(line.ready.popleft(), budget, now)
        while budget > 0 and len(line.inner) and len(self.running) < most:
            head = line.remote(now)
            if head is not None:
                blocks = self._begin(head, available, now)
                if blocks < 0:
                    return
                available -= blocks
                continue
            waiting, chunks, free = len(line.inner), len(self._chunks), self.free
            line.local = True
            super()._admit(now, budget, available)
            line.local = False
            if len(line.inner) == waiting:
                return
            budget -= sum(tokens for _, tokens in self._chunks[chunks:])
            available -= free - self.free

    def _enter(self, leg: Leg, budget: int, now: float) -> int:
        """A job whose blocks were filled is admitted; the tokens that it computes."""
        leg.target, leg.done, leg.held = leg.prompt + leg.generated, leg.cached, leg.reserved + leg.found // self._size
        leg.order = self._admitted = self._admitted + 1
        leg.first_scheduled = now
        self.kept -= leg.reserved
        self.running[leg.number] = leg
        if self._reserving is not None:
            self._reserving.admitted(leg)
        tokens = min(budget, leg.target - leg.done)
        self._take(leg, tokens, 0)
        return tokens

    @property
    def _size(self) -> int:
        return self.limits.block_size

    def _begin(self, leg: Leg, available: int, now: float) -> int:
        """Begin the pull of the head of the line; blocks that are taken, below 0 where there are too few."""
        line, cache, target = self.line, self.cache, leg.prompt + leg.generated
        hit, idle = cache.find(leg, target) if cache is not None else (0, 0)
        blocks = -(-target // self._size) - hit
        if blocks + idle + (self._spare if self.running else 0) > available:
            return -1
        line.inner.pop(now)
        leg.remote = False
        if not self.pull(leg, -(-leg.prompt // self._size) - hit, now):
            line.inner.push_back(leg, now)
            return 0
        leg.found, leg.reserved = hit * self._size, blocks
        if cache is not None:
            cache.adopt(leg)
            cache.take(blocks)
        self.pulling += 1
        self.kept += blocks
        self.free -= blocks + idle
        return blocks + idle
