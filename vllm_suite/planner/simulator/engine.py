"""One vLLM engine on a virtual clock: when each step ends, and who got a token.

What a step computes is `SimulatedScheduler`'s, what its end means `Outlet`'s. Here steps get their times: one after
another, or, with `async_scheduling`, each decided on while the one before it computes (vllm/v1/engine/core.py, 0.32,
`step_with_batch_queue`). With pipeline stages they are `Pipeline`'s, and data-parallel ranks share a `Lockstep`.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_suite.planner.simulator.clock import Clock, Kind
from vllm_suite.planner.simulator.jobs import Job, SimulationError, WaitingQueue
from vllm_suite.planner.simulator.limits import Limits
from vllm_suite.planner.simulator.lockstep import Lockstep
from vllm_suite.planner.simulator.outlet import Outlet
from vllm_suite.planner.simulator.pipeline import Pipeline
from vllm_suite.planner.simulator.steps import EMPTY, Observer, Plan, hidden, last
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.sources.steps import DecodeLine, Steps, pairs

__all__ = ["Engine", "Limits", "Observer", "Plan"]


class Engine(Outlet):
    """Steps of a colocated engine, or of a prefill or a decode instance.

    A step with prompts is one event. Steps in which the same requests only decode are one event together, up to the
    first in which one completes, before which blocks run out, or after which a job can be admitted. Ahead, the last
    step of such a run is an event of its own: during it the next one is decided on.

    Attributes:
        busy: seconds in steps; with pipeline stages the mean of what each of them was busy.
        steps: how many ended.
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
        lockstep: Lockstep | None = None,
    ) -> None:
        """An idle engine.

        Args:
            lockstep: the group of data-parallel ranks that it is one of.
            finished: called with each job that has its last token, and the time.
            prefill_only: jobs are finished at their first token. Where more are to come, elsewhere, their blocks are
                kept until `release`.
        """
        super().__init__(limits, waiting, finished, number, prefill_only=prefill_only)
        self.clock, self.source, self.observer = clock, source, observer
        self.busy, self.steps = 0.0, 0
        self._ahead = limits.async_scheduling
        # What is under way, of which `_count` steps end with the event `_version`; and what was decided on after it.
        # In a run, ahead, both are the same, and the last step is not under way yet.
        self._flight: Plan | None = None
        self._plan: Plan | None = None
        self._count, self._start = 0, 0.0
        self._version, self._idle = 0, True
        self._pipeline = Pipeline(self) if source.stages > 1 else None
        self._lockstep = lockstep
        self._pace: DecodeLine | None = None
        if lockstep is not None:
            lockstep.join(self)

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
        self._inside += 1
        self.waiting.push(job, now)
        if self._idle or self._learner is not None or self.waiting.peek(now) is job:
            self._awake(now)

    def release(self, blocks: int, now: float, job: Job | None = None) -> None:
        """Blocks of a job that left (its `held` when it did) are free: their contents were fetched, or given up.

        Args:
            job: whose; with prefix caching, and none given, the first that left with as many.

        Raises:
            SimulationError: there are not as many.
        """
        self._release(blocks, job)
        if len(self.waiting):
            self._awake(now)

    def _awake(self, now: float) -> None:
        """Something changed that may let a waiting job in."""
        if self._lockstep is not None:
            if len(self.running) < self.limits.max_num_seqs:
                self._lockstep.awake(self, now)
        elif self._idle:
            self._idle = False
            self._version += 1
            self.clock.post(now, Kind.WAKE, self.number, self._version, self._wake)
        elif self._pipeline is None and len(self.running) < self.limits.max_num_seqs:
            flight, plan = self._flight, self._plan
            if flight is not None and flight.line is not None and (not self._ahead or plan is flight):
                self._cut_short(now, flight.line)
            elif plan is not None:
                plan.count = 1

    def _stalled(self) -> bool:
        """Whether there is somebody here for whom something may have changed, while nothing is under way."""
        return len(self.waiting) > 0

    def _cut_short(self, now: float, line: DecodeLine) -> None:
        """End a run of decode steps with the step that is under way."""
        count = max(1, line.within(now - self._start))
        while self._start + line.total(count) < now:
            count += 1
        if count < self._count:
            self._post(self._start + line.total(count), count)

    def _post(self, end: float, count: int) -> None:
        self._count = count
        self._version += 1
        if self._lockstep is None:
            self.clock.post(end, Kind.STEP_END, self.number, self._version, self._finish)

    def _wake(self, now: float, version: int) -> None:
        if self._pipeline is not None:
            self._pipeline.proceed(now)
        else:
            self._proceed(now)

    def _schedule(self, now: float) -> None:
        """Decide on the next step or run of steps; idle where there is nothing to do."""
        preempted = self._decide(now)
        if self._chunks:
            self._post_mixed(now)
        elif self.decoding.count:
            self._post_run(preempted)
        else:
            self._plan = None
            if self._flight is None and self._pipeline is None:
                # Nobody is left behind but for blocks that others have yet to fetch, and items under way.
                assert preempted or self.kept or self._gated or not len(self.waiting)
                self._rest()

    def _rest(self) -> None:
        self._idle = True
        self.decoding.longest.clear()

    def _post_mixed(self, now: float) -> None:
        """Plan a step with prompts."""
        decoding, total, before, attended = self.decoding, 0, 0, 0.0
        for job, tokens in self._chunks:
            total += tokens
            before += job.done
            attended += pairs(tokens, job.done)
        extremes = decoding.extremes() if decoding.count else (0, 0)
        steps = Steps(total, len(self._chunks), before, attended, decoding.count, decoding.context, *extremes)
        self._plan = self._single(steps)

    def _single(self, steps: Steps) -> Plan:
        seconds = self.source.step_seconds(steps)
        if self._ahead:
            host = self.source.host_seconds(steps.sequences)
            seconds = max(seconds - host, host)
        return Plan(steps, seconds, None, 1)

    def _post_run(self, preempted: bool) -> None:
        """Plan steps that only decode."""
        decoding, source = self.decoding, self.source
        shape = (decoding.count, decoding.context, *decoding.extremes())
        if self._pipeline is not None:
            self._plan = self._single(Steps(0, 0, 0, 0, *shape))
            return
        line = source.decode_line(*shape)
        if self._ahead:
            line = hidden(line, source.host_seconds(decoding.count))
        # A step that preempted admits nobody; the next one may.
        count = 1 if preempted else decoding.run(self.free, self._ghosts)
        if count > line.steps:
            count = max(1, int(line.steps))
        steps = EMPTY if self.observer is None else Steps(0, 0, 0, 0, *shape)
        self._plan = Plan(steps, line.seconds, line, count)

    def _proceed(self, now: float) -> None:
        """Start the step that was decided on; ahead, decide on the one after it."""
        if not self._ahead:
            self._schedule(now)
            plan = self._plan
            if plan is not None:
                self._flight, self._start = plan, now
                line = plan.line
                self._post(now + (plan.seconds if line is None else line.total(plan.count)), plan.count)
            return
        plan = self._plan
        if plan is None:
            self._schedule(now)
            plan = self._plan
            if plan is None:
                return
        self._flight, self._start = plan, now
        if plan.count > 1:
            assert plan.line is not None
            self._post(now + plan.line.total(plan.count - 1), plan.count - 1)
            return
        if plan.sampled is None:
            plan.sampled, plan.leaving = self._apply(1)
        self._post(now + plan.seconds, 1)
        self.decoding.flying = 1
        if not self._ghosts:
            self._retire()
        self._schedule(now)

    def _finish(self, now: float, version: int) -> None:
        """A step or a run ended: tokens come out, complete jobs leave, the next step is scheduled."""
        if version != self._version:
            return
        flight, count, plan = self._flight, self._count, self._plan
        assert flight is not None
        self.busy += now - self._start
        self.steps += count
        line = flight.line if self._pace is None else self._pace
        longest = now - self._start if line is None else max(line.seconds, line.seconds + line.slope * (count - 1))
        if self.observer is not None:
            self.observer(self, self._start, now, count, flight.steps, line)
        decoding = self.decoding
        decoding.ended += count
        decoding.longest.add(decoding.ended, longest)
        if not self._ahead:
            flight.sampled, flight.leaving = self._apply(count)
        else:
            decoding.flying = 0
            if plan is flight:
                plan = self._plan = last(flight, count)
                plan.sampled, plan.leaving = self._apply(count + 1)
            elif plan is not None and plan.count == 1:
                plan.sampled, plan.leaving = self._apply(1)
        self._flight = None
        left = self._settle(flight, now)
        if left and plan is not None and plan.sampled is None:
            # Places and blocks became free that the plan did not count on, after its first step.
            plan.count = 1
            plan.sampled, plan.leaving = self._apply(1)
        self._proceed(now)
