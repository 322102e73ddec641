"""One vLLM engine on a virtual clock: what each step computes, when it ends, and who got a token.

The rules are those of vLLM V1's scheduler (vllm/v1/core/sched/scheduler.py, 0.32): running requests before waiting
ones, a token budget, prompts in chunks, blocks of cache taken as tokens come, the last of the running preempted where
they run out and computed again, no admission in a step that preempted, a waiting request admitted only if all its
tokens fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vllm_suite.planner.simulator.clock import Clock, Kind
from vllm_suite.planner.simulator.decoding import Decoding
from vllm_suite.planner.simulator.gaps import LongestSteps
from vllm_suite.planner.simulator.jobs import FirstCome, Job, SimulationError, WaitingQueue
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.sources.steps import DecodeLine, Steps, pairs


@dataclass(frozen=True)
class Limits:
    """An engine's settings, by vLLM's names.

    Attributes:
        blocks: of the cache; what vLLM logs as the number of GPU blocks less one, which it keeps for itself.
        reserve_full_isl: `scheduler_reserve_full_isl`: whether the whole sequence has to fit for admission, or only the
            first chunk.
    """

    blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    reserve_full_isl: bool = True

    def __post_init__(self) -> None:
        if min(self.blocks, self.block_size, self.max_num_seqs) < 1:
            raise SimulationError(f"{self}: blocks, block_size and max_num_seqs have to be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise SimulationError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs};"
                " vLLM refuses that"
            )


class Observer(Protocol):
    """Sees every run of steps, for timelines, occupancy and single gaps. It costs time: one call for each event."""

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        """`count` steps ended. `steps` is the first of them; `line` gives the times of each where they only decode."""
        ...


class Engine:
    """Steps of a colocated engine, or of a prefill or a decode instance.

    A step with prompts is one event. Steps in which the same requests only decode are one event together, up to the
    first in which one completes, before which blocks run out, or after which a job can be admitted.

    Attributes:
        number: unique among engines of a clock.
        running: jobs in prefill or decode, in order of admission.
        waiting: the others.
        free: blocks.
        kept: blocks of jobs that left with their cache still to be fetched.
        busy: seconds in steps.
        steps: how many ended.
        preemptions: of jobs.
    """

    def __init__(
        self,
        clock: Clock,
        source: LatencySource,
        limits: Limits,
        finished: Callable[[Job, float], None],
        *,
        number: int = 0,
        waiting: WaitingQueue | None = None,
        observer: Observer | None = None,
        prefill_only: bool = False,
    ) -> None:
        """An idle engine.

        Args:
            finished: called with each job that has its last token, and the time.
            prefill_only: jobs are finished at their first token. Where more are to come, elsewhere, their blocks are
                kept until `release`.
        """
        self.clock, self.source, self.limits, self.finished, self.number = clock, source, limits, finished, number
        self.waiting: WaitingQueue = FirstCome() if waiting is None else waiting
        self.observer, self.prefill_only = observer, prefill_only
        self.kept = 0
        self.running: dict[int, Job] = {}
        self.decoding = Decoding(limits.block_size)
        self.free = limits.blocks
        self.busy, self.steps, self.preemptions = 0.0, 0, 0
        self._admitted = 0
        # The job whose prompt did not fit into the budget. There is at most one, and it is the last of the running: it
        # took up the budget, and does so in the following steps, so nobody is admitted after it.
        self._partial: Job | None = None
        # The step or run under way: none while _version was posted as a wake-up, or nothing was.
        self._chunks: list[tuple[Job, int]] = []
        self._line: DecodeLine | None = None
        self._count, self._start, self._end = 0, 0.0, 0.0
        self._now_steps = Steps()
        self._version, self._idle = 0, True
        self._longest = LongestSteps()

    def accept(self, job: Job, now: float) -> None:
        """A job arrives at this engine.

        Raises:
            SimulationError: it would not fit into the cache if it were alone.
        """
        size, blocks = self.limits.block_size, self.limits.blocks
        most = job.prompt if self.prefill_only else job.prompt + job.output - 1
        if -(-most // size) > blocks:
            raise SimulationError(
                f"request {job.number} needs {most} tokens of cache, engine {self.number} has {blocks * size}"
            )
        self.waiting.push(job, now)
        if self._idle or self.waiting.peek(now) is job:
            self._awake(now)

    def release(self, blocks: int, now: float) -> None:
        """Blocks of a job that left (its `held` when it did) are free: their contents were fetched, or given up.

        Raises:
            SimulationError: there are not as many.
        """
        if blocks > self.kept:
            raise SimulationError(f"engine {self.number} keeps {self.kept} blocks, {blocks} were released")
        self.kept -= blocks
        self.free += blocks
        if len(self.waiting):
            self._awake(now)

    def _awake(self, now: float) -> None:
        """Something changed that may let a waiting job in."""
        if self._idle:
            self._idle = False
            self._version += 1
            self.clock.post(now, Kind.WAKE, self.number, self._version, self._wake)
        elif self._line is not None and len(self.running) < self.limits.max_num_seqs:
            self._cut_short(now)

    def _cut_short(self, now: float) -> None:
        """End a run of decode steps with the step that is under way."""
        assert self._line is not None
        count = max(1, self._line.within(now - self._start))
        while self._start + self._line.total(count) < now:
            count += 1
        if count < self._count:
            self._post(count)

    def _post(self, count: int) -> None:
        assert self._line is not None
        self._count, self._end = count, self._start + self._line.total(count)
        self._version += 1
        self.clock.post(self._end, Kind.STEP_END, self.number, self._version, self._finish)

    def _wake(self, now: float, version: int) -> None:
        self._schedule(now)

    def _schedule(self, now: float) -> None:
        """Decide on the next step or run of steps and post its end; idle where there is nothing to do."""
        limits, decoding, running = self.limits, self.decoding, self.running
        preempted = decoding.needed() > self.free and self._preempt(now)
        # Blocks that the decoding jobs take in this step are theirs before anybody else's.
        available = self.free - decoding.needed()
        budget = limits.max_num_batched_tokens - decoding.count
        size, chunks = limits.block_size, self._chunks
        partial = self._partial
        if partial is not None:
            tokens = min(budget, partial.target - partial.done)
            blocks = -(-(partial.done + tokens) // size) - partial.held
            if blocks > available:
                del running[partial.number]
                self._evict(partial, now)
                available = self.free - decoding.needed()
                preempted = True
            else:
                self._take(partial, tokens, blocks)
                available -= blocks
                budget -= tokens
        waiting = self.waiting
        if not preempted:
            while budget > 0 and len(waiting) and len(running) < limits.max_num_seqs:
                job = waiting.peek(now)
                target = job.prompt + job.generated
                done = 0 if job.preemptions else job.cached
                tokens = min(budget, target - done)
                blocks = -(-(done + tokens) // size)
                if (-(-target // size) if limits.reserve_full_isl else blocks) > available:
                    break
                waiting.pop(now)
                job.target, job.done, job.held = target, done, 0
                job.order = self._admitted = self._admitted + 1
                if job.first_scheduled != job.first_scheduled:
                    job.first_scheduled = now
                running[job.number] = job
                self._take(job, tokens, blocks)
                available -= blocks
                budget -= tokens
        self._start = now
        if chunks:
            self._post_mixed(now)
        elif decoding.count:
            self._line = line = self.source.decode_line(decoding.count, decoding.context, *decoding.extremes())
            if self.observer is not None:
                self._now_steps = Steps(0, 0, 0, 0, decoding.count, decoding.context, *decoding.extremes())
            # A step that preempted admits nobody; the next one may.
            count = 1 if preempted else decoding.run(self.free)
            if count > line.steps:
                count = max(1, int(line.steps))
            self._post(count)
        else:
            # A job that is alone always fits, so nobody is left behind but for blocks that others have yet to fetch.
            assert self.kept or not preempted
            assert self.kept or not len(self.waiting)
            self._idle = True
            self._longest.clear()

    def _take(self, job: Job, tokens: int, blocks: int) -> None:
        self._chunks.append((job, tokens))
        self.free -= blocks
        job.held += blocks

    def _post_mixed(self, now: float) -> None:
        decoding, total, before, attended = self.decoding, 0, 0, 0.0
        for job, tokens in self._chunks:
            total += tokens
            before += job.done
            attended += pairs(tokens, job.done)
        extremes = decoding.extremes() if decoding.count else (0, 0)
        steps = Steps(total, len(self._chunks), before, attended, decoding.count, decoding.context, *extremes)
        self._line, self._count, self._now_steps = None, 1, steps
        self._end = now + self.source.step_seconds(steps)
        self._version += 1
        self.clock.post(self._end, Kind.STEP_END, self.number, self._version, self._finish)

    def _preempt(self, now: float) -> bool:
        """Give each decoding job its block in order of admission, taking from the last ones where there is none."""
        running, decoding, free = self.running, self.decoding, self.free
        for job in list(running.values()):
            if job.number not in running:
                break
            if job.finish < 0 or not decoding.needs(job):
                continue
            while free == 0:
                _, victim = running.popitem()
                free += self._evict(victim, now)
                if victim is job:
                    return True
            free -= 1
        return True

    def _evict(self, job: Job, now: float) -> int:
        """Take a job's cache away and send it to the queue; how many blocks that freed."""
        if job.finish >= 0:
            held = self.decoding.held(job)
            self._note_gap(job)
            job.generated = job.output - self.decoding.remaining(job)
            job.last_token = now
            self.decoding.leave(job)
        else:
            held = job.held
            if job is self._partial:
                self._partial = None
        self.free += held
        job.held = job.done = 0
        job.preemptions += 1
        self.preemptions += 1
        self.waiting.push_back(job, now)
        return held

    def _finish(self, now: float, version: int) -> None:
        """A step or a run ended: tokens come out, complete jobs leave, the next step is scheduled."""
        if version != self._version:
            return
        decoding, line, count = self.decoding, self._line, self._count
        self.busy += now - self._start
        self.steps += count
        longest = now - self._start if line is None else max(line.seconds, line.seconds + line.slope * (count - 1))
        if self.observer is not None:
            self.observer(self, self._start, now, count, self._now_steps, line)
        self._line = None
        self.free -= decoding.advance(count)
        self._longest.add(decoding.step, longest)
        for job in decoding.complete():
            self.free += decoding.held(job)
            self._note_gap(job)
            decoding.leave(job)
            self._done(job, now)
        if self._chunks:
            chunks, self._chunks, self._partial = self._chunks, [], None
            for job, tokens in chunks:
                job.done += tokens
                if job.done == job.target:
                    self._sampled(job, now)
                else:
                    self._partial = job
        self._schedule(now)

    def _sampled(self, job: Job, now: float) -> None:
        """The end of a prefill: the next token."""
        if job.generated:
            job.longest_gap = max(job.longest_gap, now - job.last_token)
        else:
            job.first_token = now
        job.generated += 1
        if job.generated == job.output:
            self.free += job.held
            self._done(job, now)
        elif self.prefill_only:
            self.kept += job.held
            self._done(job, now)
        else:
            self.decoding.join(job)

    def _note_gap(self, job: Job) -> None:
        """The longest step in which the job decoded, this time."""
        job.longest_gap = max(job.longest_gap, self._longest.since(job.joined))

    def _done(self, job: Job, now: float) -> None:
        job.last_token = now
        del self.running[job.number]
        self.finished(job, now)
