"""Several batches under way in one engine, one behind the other through its pipeline stages.

The loop is that of vLLM's engine core (vllm/v1/engine/core.py, `step_with_batch_queue`, 0.32): batches are scheduled
until the queue is full, an empty one takes a place too, and then the oldest is waited for. A request is in one batch at
a time, so those that decode form as many groups as there are batches; what is left empty are the pipeline's bubbles.
With `async_scheduling` it is that of vLLM's second model runner: one batch more is under way, and a request is in the
next batch but so many as there are stages, before its last token is known. That batch waits at the first stage until
the last one has sampled the token.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from vllm_suite.planner.simulator.clock import Kind
from vllm_suite.planner.simulator.cruise import cruise
from vllm_suite.planner.simulator.decoding import Decoding
from vllm_suite.planner.simulator.jobs import Job

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.engine import Engine
    from vllm_suite.planner.simulator.steps import Plan
    from vllm_suite.planner.sources.steps import Steps


class Batch:
    """A batch under way, or an empty one.

    Attributes:
        end: when its result is there.
        start: when it entered the first stage.
        partial: the job of which it computes a part of the prompt that is not the last.
    """

    __slots__ = ("cohort", "end", "partial", "plan", "start")

    def __init__(self, cohort: Decoding, plan: Plan | None, start: float, end: float, partial: Job | None) -> None:
        self.cohort, self.plan, self.start, self.end, self.partial = cohort, plan, start, end, partial


class Pipeline:
    """The batches of one engine.

    Attributes:
        queue: batches under way, oldest first; `places` at most.
        cohorts: groups of jobs that decode together; ahead, those of every so many batches as there are stages, else
            any that is not under way is next.
        last_end: of each cohort's batches.
        known_at: when the tokens of each cohort's newest batch are, or will be, known.
        free_at: when each stage is.
        calls: batches that were scheduled, empty ones too.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        stages, ahead = engine.source.stages, engine.limits.async_scheduling
        self.places = stages + 1 if ahead else stages
        self.queue: deque[Batch] = deque()
        self.cohorts = [engine.decoding, *(Decoding(engine.limits.block_size) for _ in range(stages - 1))]
        self.last_end = [0.0] * stages
        self.known_at = [0.0] * stages
        self.free_at = [0.0] * stages
        self.calls = 0

    def proceed(self, now: float) -> None:
        """Schedule until a result has to be waited for."""
        engine, queue, empty = self.engine, self.queue, 0
        while True:
            if engine._inside or engine._left:
                engine._left = False
                batch = self._next(now)
                if len(queue) < self.places and (batch.plan is not None or engine._inside):
                    continue
            if not queue or (empty > self.places and all(each.plan is None for each in queue)):
                # What waits can only be let in by somebody else.
                queue.clear()
                engine._rest()
                return
            if queue[0].end > now:
                cruise(self)
                engine._version += 1
                engine.clock.post(queue[0].end, Kind.STEP_END, engine.number, engine._version, self._ended)
                return
            empty += queue[0].plan is None
            self.take(now)

    def _ended(self, now: float, version: int) -> None:
        if version != self.engine._version:
            return
        self.take(now)
        self.proceed(now)

    def _next(self, now: float) -> Batch:
        """Decide on the next batch and send it on its way."""
        batch, start = self.decide(now), now
        if batch.plan is None:
            end = max(now, self.queue[-1].end if self.queue else 0.0)
        else:
            start, end = self._enter(batch.plan, self.ready(batch, now))
        self.send(batch, start, end)
        return batch

    def decide(self, now: float) -> Batch:
        """The next batch, which has yet to be sent."""
        engine = self.engine
        cohort = self._choose()
        self.calls += 1
        engine.decoding = cohort
        if engine.limits.async_scheduling and not engine._ghosts:
            engine._retire()
        engine._plan = None
        engine._schedule(now)
        plan = engine._plan
        if plan is None:
            return Batch(cohort, None, now, now, None)
        plan.sampled, plan.leaving = engine._apply(1)
        cohort.flying += 1
        partial = engine._partial
        if partial is not None:
            partial.flying += 1
        return Batch(cohort, plan, now, now, partial)

    def ready(self, batch: Batch, now: float) -> float:
        """When the tokens that a batch decodes from are known."""
        assert batch.plan is not None
        if not batch.plan.steps.decode_sequences:
            return now
        return max(now, self.known_at[self.cohorts.index(batch.cohort)])

    def send(self, batch: Batch, start: float, end: float) -> None:
        """A batch is under way between these times."""
        batch.start, batch.end = start, end
        if batch.plan is not None:
            self.known_at[self.cohorts.index(batch.cohort)] = end
        self.queue.append(batch)

    def _choose(self) -> Decoding:
        if self.engine.limits.async_scheduling:
            return self.cohorts[self.calls % len(self.cohorts)]
        idle = [cohort for cohort in self.cohorts if not cohort.flying]
        return next((cohort for cohort in idle if cohort.count), idle[0])

    def _enter(self, plan: Plan, ready: float) -> tuple[float, float]:
        """A batch goes through the stages, each as soon as it and the batch are free; when it enters and leaves."""
        free_at = self.free_at
        others, slowest = self.shares(plan)
        start = at = max(ready, free_at[0])
        for stage in range(len(free_at) - 1):
            at = free_at[stage] = max(at, free_at[stage]) + others
        at = free_at[-1] = max(at, free_at[-1]) + slowest
        self.engine.busy += max(plan.seconds, slowest) / len(free_at)
        return start, at

    def shares(self, plan: Plan) -> tuple[float, float]:
        """Seconds in each stage but the last, and in the last: the slowest, as it has the output head."""
        slowest = self.slowest(plan.steps)
        return max(0.0, plan.seconds - slowest) / (len(self.free_at) - 1), slowest

    def slowest(self, steps: Steps) -> float:
        """Seconds in the last stage."""
        source = self.engine.source
        seconds = source.stage_seconds(steps)
        if self.engine.limits.async_scheduling:
            host = source.host_seconds(steps.sequences)
            seconds = max(seconds - host, host)
        return seconds

    def take(self, now: float) -> None:
        """The oldest batch has ended: its tokens come out."""
        batch, engine = self.queue.popleft(), self.engine
        plan, cohort = batch.plan, batch.cohort
        if plan is None:
            return
        engine.decoding = cohort
        engine.steps += 1
        if engine.observer is not None:
            engine.observer(engine, batch.start, now, 1, plan.steps, None)
        if batch.partial is not None:
            batch.partial.flying -= 1
        cohort.flying -= 1
        cohort.ended += 1
        index = self.cohorts.index(cohort)
        cohort.longest.add(cohort.ended, now - self.last_end[index])
        self.last_end[index] = now
        engine._settle(plan, now)
