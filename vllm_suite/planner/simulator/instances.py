"""Engines as members of a fleet: with counts of their cache, encoding of their own, and pulls before they decode."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.jobs import FirstCome, Job, WaitingQueue
from vllm_suite.planner.sources.base import FloatArray, LatencySource
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.workload import Item


@dataclass(slots=True, eq=False)
class Leg(Job):
    """A request on one instance.

    Attributes:
        flight: the fleet's own record of the request.
        items: that this instance has to encode itself.
        remote: its keys and values lie on a prefill instance, and the pull has not begun.
        reserved: blocks that a pull fills or has filled.
    """

    flight: Any = None
    items: tuple[Item, ...] = ()
    remote: bool = False
    reserved: int = 0


class OwnEncoder(LatencySource):
    """Step times with the encoder's in them: vLLM encodes an item in the step that takes up its first token.

    Items are taken to stand at the start of the prompt, one after another. What was encoded stays in vLLM's encoder
    cache, least recently used first out, up to `keep` tokens.
    """

    def __init__(self, source: LatencySource, seconds: Callable[[Item], float], keep: int) -> None:
        self.inner, self.item_seconds, self.keep = source, seconds, keep
        self.name, self.stages = source.name, source.stages
        self.uncertainty, self.outside = source.uncertainty, source.outside
        self.encoded = 0
        self.extra = 0.0
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._size = 0

    def chunk(self, leg: Leg, tokens: int) -> float:
        """Seconds of the items that a chunk of so many tokens begins with or reaches."""
        begin, end, at, total = leg.done, leg.done + tokens, 0, 0.0
        first = begin == leg.cached
        for item in leg.items:
            if at >= end:
                break
            if at >= begin or (first and at + item.tokens > begin):
                total += self._item(item)
            at += item.tokens
        return total

    def _item(self, item: Item) -> float:
        kept, content = self._kept, item.content
        if content is not None:
            if content in kept:
                kept.move_to_end(content)
                return 0.0
            kept[content] = item.tokens
            self._size += item.tokens
            while self._size > self.keep and kept:
                self._size -= kept.popitem(last=False)[1]
        self.encoded += 1
        return self.item_seconds(item)

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`; with the items of the step under way."""
        extra, self.extra = self.extra, 0.0
        return self.inner.step_seconds(steps) + extra

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`; without items."""
        return self.inner.seconds(steps)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`; a decode step encodes nothing."""
        return self.inner.decode_line(sequences, context, longest, shortest)


class Hosted(Engine):
    """An engine of a pool, which counts how full its cache is.

    Attributes:
        peak: most blocks taken after any step was scheduled.
        seen: seconds up to which its cache is counted; when it began, at first.
    """

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

    def _note(self, now: float) -> None:
        """How full the cache is from now on."""
        self._used = used = self.limits.blocks - self.free
        self._growth = 0.0
        if used > self.peak:
            self.peak = used

    def release(self, blocks: int, now: float) -> None:
        """See `Engine`."""
        self.tally(now)
        super().release(blocks, now)
        # What a run under way has taken since its start is not known here; its growth goes on from what it had.
        self._used -= blocks

    def _schedule(self, now: float) -> None:
        self.tally(now)
        super()._schedule(now)
        self._note(now)
        if self.decoding.count and self._end > now:
            self._growth = self._count * self.decoding.count / self.limits.block_size / (self._end - now)

    def _post_mixed(self, now: float) -> None:
        source = self.source
        if isinstance(source, OwnEncoder):
            source.extra = sum(
                source.chunk(job, tokens)
                for job, tokens in self._chunks
                if isinstance(job, Leg) and job.items and not job.preemptions
            )
        super()._post_mixed(now)


class HeadOfLine(WaitingQueue):
    """A decode instance's queue. Jobs whose pull has ended come first, as vLLM takes requests that hold blocks first.

    A remote job at the head of the others hides them from the engine: it takes no part in a step before its pull, and
    nobody overtakes it.
    """

    def __init__(self, inner: WaitingQueue) -> None:
        self.inner = inner
        self.ready: deque[Leg] = deque()
        self.blocked = False

    def look(self, now: float) -> Leg | None:
        """The remote job at the head of the others, if there is one."""
        head = self.inner.peek(now) if len(self.inner) else None
        found = head if isinstance(head, Leg) and head.remote else None
        self.blocked = found is not None
        return found

    def push(self, job: Job, now: float) -> None:
        """See `WaitingQueue`."""
        self.inner.push(job, now)
        self.look(now)

    def push_back(self, job: Job, now: float) -> None:
        """See `WaitingQueue`."""
        self.inner.push_back(job, now)
        self.look(now)

    def peek(self, now: float) -> Job:
        """See `WaitingQueue`."""
        return self.ready[0] if self.ready else self.inner.peek(now)

    def pop(self, now: float) -> Job:
        """See `WaitingQueue`."""
        if self.ready:
            return self.ready.popleft()
        job = self.inner.pop(now)
        self.look(now)
        return job

    def __len__(self) -> int:
        return len(self.ready) + (0 if self.blocked else len(self.inner))

    @property
    def total(self) -> int:
        """With the hidden ones."""
        return len(self.ready) + len(self.inner)


# Starts the pull of a leg into so many blocks; False where the prefill instance has given its blocks up.
Puller = Callable[[Leg, int, float], bool]


class Receiving(Hosted):
    """A decode instance: a job that was prefilled elsewhere gets all its blocks, then its pull begins, then it runs.

    As in vLLM's scheduler a pull begins where a waiting request could be admitted: in a step that preempted nobody and
    has budget and a free place among the running. Its blocks are held from then on (`kept`, until it is admitted);
    during the pull it takes no place and no budget.

    Attributes:
        pulling: jobs whose pull is under way.
    """

    pull: Puller
    pulling = 0

    def __init__(self, *args: Any, waiting: WaitingQueue | None = None, **more: Any) -> None:
        """As `Engine`."""
        super().__init__(*args, waiting=HeadOfLine(FirstCome() if waiting is None else waiting), **more)

    @property
    def line(self) -> HeadOfLine:
        """Its queue."""
        assert isinstance(self.waiting, HeadOfLine)
        return self.waiting

    def pulled(self, leg: Leg, now: float) -> None:
        """A pull ended."""
        self.pulling -= 1
        self.line.ready.append(leg)
        self._awake(now)

    def _schedule(self, now: float) -> None:
        self.tally(now)
        self._begin_pulls(now)
        line, admitted = self.line, self._sure(now)
        # Exactly these are admitted in this step, so nobody else gets the blocks that they held.
        for index in range(admitted):
            blocks = line.ready[index].reserved
            self.kept -= blocks
            self.free += blocks
        left, preempted = len(line.ready) - admitted, self.preemptions
        super()._schedule(now)
        assert len(line.ready) == left
        if self._idle and self.preemptions > preempted:
            # The last of the running made way for itself: the next step may admit it, whatever pulls hold.
            self._awake(now)
        if self._chunks:
            # A job that was not remote may have made way for remote ones behind it.
            self._begin_pulls(now)

    def _room(self) -> tuple[int, int]:
        """Blocks and token budget that the running jobs leave in the step that is being scheduled."""
        decoding, limits, partial = self.decoding, self.limits, self._partial
        room, budget = self.free - decoding.needed(), limits.max_num_batched_tokens - decoding.count
        for _, tokens in self._chunks:
            budget -= tokens
        if partial is not None and not self._chunks:
            tokens = min(budget, partial.target - partial.done)
            room -= -(-(partial.done + tokens) // limits.block_size) - partial.held
            budget -= tokens
        return room, budget

    def _sure(self, now: float) -> int:
        """How many of the jobs whose pull has ended this step admits."""
        ready = len(self.line.ready)
        if not ready:
            return 0
        room, budget = self._room()
        return 0 if room < 0 else max(0, min(ready, self.limits.max_num_seqs - len(self.running), budget))

    def _begin_pulls(self, now: float) -> None:
        line, size = self.line, self.limits.block_size
        head = line.look(now)
        if head is None:
            return
        room, budget = self._room()
        # Those that are ready are admitted first. With none running a pull may take all that is free.
        if budget <= len(line.ready) or len(self.running) + len(line.ready) >= self.limits.max_num_seqs:
            return
        while head is not None:
            blocks = -(-(head.prompt + head.generated) // size)
            if blocks > room:
                return
            line.inner.pop(now)
            head.remote = False
            if self.pull(head, blocks, now):
                head.reserved = blocks
                self.pulling += 1
                self.free -= blocks
                self.kept += blocks
                room -= blocks
            else:
                line.inner.push_back(head, now)
            head = line.look(now)
