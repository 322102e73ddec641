"""What an engine's next step computes: the rules of vLLM V1's scheduler (vllm/v1/core/sched/scheduler.py, 0.32).

Running requests before waiting ones, a token budget, prompts in chunks, blocks of cache taken as tokens come, the last
of the running preempted where they run out and computed again, no admission in a step that preempted, a waiting request
admitted only if all its tokens fit.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_suite.planner.simulator.decoding import Decoding
from vllm_suite.planner.simulator.jobs import Choosing, FirstCome, Job, Reserving, WaitingQueue
from vllm_suite.planner.simulator.limits import Limits
from vllm_suite.planner.simulator.prefix import PrefixCache

_NOBODY: tuple[tuple[Job, ...], tuple[Job, ...]] = ((), ())


def _choosing(queue: WaitingQueue) -> Choosing | None:
    return queue if isinstance(queue, Choosing) and queue.chooses else None


class SimulatedScheduler:
    """The state of vLLM's scheduler, and its decisions.

    A decision takes effect with `_apply`, at the latest before the next one. Jobs that decode are in `decoding`; where
    several batches are under way there are several of these, and `decoding` is the one to decide on.

    Attributes:
        running: jobs in prefill or decode, in order of admission.
        waiting: the others.
        free: blocks.
        kept: blocks of jobs that left with their cache still to be fetched.
        preemptions: of jobs.
        cache: finds blocks by their contents; None without prefix caching.
    """

    def __init__(self, limits: Limits, waiting: WaitingQueue | None = None, *, prefill_only: bool = False) -> None:
        self.limits, self.prefill_only = limits, prefill_only
        self.waiting: WaitingQueue = FirstCome() if waiting is None else waiting
        self.running: dict[int, Job] = {}
        self.decoding = Decoding(limits.block_size)
        self.free, self.kept, self.preemptions = limits.blocks, 0, 0
        self.cache = PrefixCache(limits.blocks, limits.block_size) if limits.prefix_caching else None
        self._admitted = 0
        # Who says how much an admission leaves free, and blocks that those of this step do.
        reserving = self.waiting if isinstance(self.waiting, Reserving) and not prefill_only else None
        self._reserving: Reserving | None = reserving
        self._choosing: Choosing | None = _choosing(self.waiting) if not prefill_only else None
        # Whether jobs may have to wait in the middle of their prompts; see `Overlapping`.
        self._gated = False
        self._spare = 0
        # The job whose prompt did not fit into the budget. There is at most one, and it is the last of the running: it
        # took up the budget, and does so in the following steps, so nobody is admitted after it.
        self._partial: Job | None = None
        # Prompt chunks of the step that was decided on, and blocks that the cache gave up for its decoding jobs.
        self._chunks: list[tuple[Job, int]] = []
        self._given = 0
        # Steps for which a job stays after its last token: one is decided on before that token is seen.
        self._ghosts = int(limits.async_scheduling and not limits.by_length and not prefill_only)

    def _decide(self, now: float) -> bool:
        """Choose `_chunks` to go beside the jobs of `decoding`; whether a job was preempted."""
        limits, decoding = self.limits, self.decoding
        if self._choosing is not None and len(self.running) > 1 and self._short():
            self._arrange(self._choosing)
        preempted = decoding.needed() > self.free and self._preempt(now)
        if self._choosing is not None and self._partial is not None:
            preempted |= self._make_room(now)
        # Blocks that the decoding jobs take in this step are theirs before anybody else's.
        needed = decoding.needed()
        available = self.free - needed
        if self.cache is not None:
            self.cache.take(needed)
            self._given = needed
        budget = limits.max_num_batched_tokens - decoding.count
        partial = self._partial
        if partial is not None:
            tokens = min(budget, partial.target - partial.done)
            blocks = -(-(partial.done + tokens) // limits.block_size) - partial.held
            if blocks > available:
                self._evict(partial, now)
                preempted = True
            else:
                self._take(partial, tokens, blocks)
                available -= blocks
                budget -= tokens
        if not preempted and budget > 0 and len(self.waiting):
            if self._reserving is not None:
                self._spare = -(-self._reserving.headroom // limits.block_size)
            self._admit(now, budget, available)
        return preempted

    def _admit(self, now: float, budget: int, available: int) -> None:
        """Let waiting jobs in."""
        limits, waiting, running, cache = self.limits, self.waiting, self.running, self.cache
        size, spare = limits.block_size, self._spare
        passed: list[Job] = []
        while budget > 0 and len(waiting) and len(running) < limits.max_num_seqs:
            job = waiting.peek(now)
            if job.flying:
                # A token of it is still to come, so it cannot go on yet; vLLM looks at the next one.
                passed.append(waiting.pop(now))
                continue
            target = job.prompt + job.generated
            done = 0 if job.preemptions else job.cached
            hit = idle = 0
            if cache is not None:
                hit, idle = cache.find(job, target)
                done = max(done, hit * size)
            tokens = min(budget, target - done)
            if self._gated:
                tokens = min(tokens, self._open(job, done))
                if tokens < 1:
                    passed.append(waiting.pop(now))
                    continue
            blocks = -(-(done + tokens) // size) - hit
            needed = (-(-target // size) - hit if limits.reserve_full_isl else blocks) + idle
            if needed > available or (spare and running and needed + spare > available):
                break
            waiting.pop(now)
            job.target, job.done, job.held = target, done, hit
            job.order = self._admitted = self._admitted + 1
            if job.first_scheduled != job.first_scheduled:
                job.first_scheduled = now
                job.found = hit * size
            running[job.number] = job
            if self._reserving is not None:
                self._reserving.admitted(job)
            if cache is not None:
                cache.adopt(job)
                self.free -= idle
            self._take(job, tokens, blocks)
            available -= blocks + idle
            budget -= tokens
        for job in reversed(passed):
            waiting.push_back(job, now)

    def _open(self, job: Job, done: int) -> int:
        """Tokens that a waiting job may compute after so many."""
        raise NotImplementedError

    def _take(self, job: Job, tokens: int, blocks: int) -> None:
        self._chunks.append((job, tokens))
        self.free -= blocks
        job.held += blocks
        if self.cache is not None:
            self.cache.take(blocks)
            self.cache.commit(job, job.done + tokens)

    def _apply(self, count: int) -> tuple[Sequence[Job], Sequence[Job]]:
        """The step that was decided on takes effect, and `count` - 1 more like it.

        Returns:
            Jobs that it gives a first token after a prefill, and those of them that leave with it.
        """
        decoding = self.decoding
        taken = decoding.advance(count)
        self.free -= taken
        if self.cache is not None:
            self.cache.take(taken - self._given)
        if not self._chunks:
            return _NOBODY
        sampled: list[Job] = []
        leaving: list[Job] = []
        chunks, self._chunks, self._partial = self._chunks, [], None
        for job, tokens in chunks:
            job.done += tokens
            if job.done < job.target:
                self._partial = job
                continue
            job.generated += 1
            sampled.append(job)
            if job.generated < job.output + self._ghosts and not self.prefill_only:
                decoding.join(job)
            else:
                leaving.append(job)
        return sampled, leaving

    def _retire(self) -> None:
        """Where lengths are known, a job that has all its tokens but those under way decodes no more; it stays among
        the running until it has them.
        """
        decoding = self.decoding
        for job in decoding.complete(decoding.step):
            job.held = decoding.held(job)
            decoding.leave(job)
            decoding.ending.append(job)

    def _preempt(self, now: float) -> bool:
        """Give each decoding job its block in order of admission, taking from the last ones where there is none."""
        running, decoding, free = self.running, self.decoding, self.free
        for job in list(running.values()):
            if job.number not in running:
                break
            if job.finish < 0 or job.cohort is not decoding or not decoding.needs(job):
                continue
            while free == 0:
                victim = next(reversed(running.values()))
                free += self._evict(victim, now)
                if victim is job:
                    return True
            free -= 1
        return True

    def _short(self) -> bool:
        """Whether blocks may run out in this step, as vllm_suite/compat/length_scheduler.py has it."""
        worst, partial = len(self.running), self._partial is not None
        if partial:
            worst += self.limits.max_num_batched_tokens // self.limits.block_size
        return self.free < worst and (partial or self.free < self.decoding.needed())

    def _arrange(self, choosing: Choosing) -> None:
        """Put those that are to give way at the end of the running."""

        def place(job: Job) -> tuple[bool, float]:
            if job.finish < 0:
                return choosing.standing(job, job.generated)
            cohort = job.cohort
            assert cohort is not None
            # Tokens under way are not known yet.
            return choosing.standing(job, job.output - cohort.remaining(job) - cohort.flying)

        self.running = {job.number: job for job in sorted(self.running.values(), key=place)}

    def _make_room(self, now: float) -> bool:
        """The last ones give way until the prompt under way has its blocks, or does so itself; whether any did."""
        limits, decoding, preempted = self.limits, self.decoding, False
        while (job := self._partial) is not None:
            tokens = min(limits.max_num_batched_tokens - decoding.count, job.target - job.done)
            if -(-(job.done + tokens) // limits.block_size) - job.held <= self.free - decoding.needed():
                break
            self._evict(next(reversed(self.running.values())), now)
            preempted = True
        return preempted

    def _evict(self, job: Job, now: float) -> int:
        """Take a running job's cache away and send it to the queue; how many blocks that freed."""
        del self.running[job.number]
        if self._reserving is not None:
            self._reserving.stopped(job)
        requeue = True
        if job.finish >= 0:
            cohort = job.cohort
            assert cohort is not None
            held, flying, left = cohort.held(job), cohort.flying, cohort.remaining(job)
            job.generated = job.output - left
            # Blocks are found by their contents once these are known, which a token under way is not.
            known = job.prompt + job.generated - flying
            full = known if flying and (job.joined == cohort.step or not self.limits.async_scheduling) else known - 1
            if flying:
                job.flying += flying
                cohort.late.append(job)
                requeue = left > 0
            else:
                self._note_gap(job)
                job.last_token = now
            cohort.leave(job)
        else:
            held, full = job.held, job.done
            if job is self._partial:
                self._partial = None
            else:
                requeue = False
        freed = self._give_back(job, held, full)
        job.held = job.done = 0
        job.preemptions += 1
        self.preemptions += 1
        if requeue:
            self.waiting.push_back(job, now)
        return freed

    def _give_back(self, job: Job, held: int, full: int, *, left: bool = False) -> int:
        """Blocks of a job that leaves, or has to wait again, of which `full` tokens' contents are known; how many no
        other job holds.
        """
        freed = held if self.cache is None else self.cache.release(job, held, full, left)
        self.free += freed
        return freed

    def _note_gap(self, job: Job) -> None:
        """The longest step in which the job decoded, this time."""
        assert job.cohort is not None
        job.longest_gap = max(job.longest_gap, job.cohort.longest.since(job.joined))
