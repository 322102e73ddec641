"""Data-parallel ranks that have pipeline stages: the batches of all ranks go through the stages together.

Each rank has its own scheduler and as many batches under way as `Pipeline` says. The experts of a stage are shared over
its ranks, so the n-th batches of all ranks hold a stage for as long as the slowest of them takes, and a rank with
nothing to compute takes part with an empty batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_suite.planner.simulator.clock import Clock, Kind

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.engine import Engine
    from vllm_suite.planner.simulator.pipeline import Pipeline


class StagedRanks:
    """The ranks of one engine.

    Attributes:
        ranks: in the order in which they were made; all with as many stages.
        busy: seconds of stages, as a mean over them.
        steps: batches that ended, those of all ranks together as one.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ranks: list[Engine] = []
        self.busy, self.steps = 0.0, 0
        self._running = False
        self._free_at: list[float] = []
        self._version = 0

    def join(self, rank: Engine) -> None:
        """A rank is made."""
        self.ranks.append(rank)
        self._free_at = [0.0] * rank.source.stages

    def awake(self, now: float) -> None:
        """Somebody may be able to let a waiting job in; where batches are under way, that is looked at in time."""
        if not self._running:
            self._running = True
            self._version += 1
            self.clock.post(now, Kind.WAKE, self.ranks[0].number, self._version, self._wake)

    @property
    def _pipelines(self) -> list[Pipeline]:
        found = [rank._pipeline for rank in self.ranks]
        return [pipeline for pipeline in found if pipeline is not None]

    def _wake(self, now: float, version: int) -> None:
        for rank in self.ranks:
            rank._idle = False
        self._proceed(now)

    def _ended(self, now: float, version: int) -> None:
        if version == self._version:
            self._take(now)
            self._proceed(now)

    def _proceed(self, now: float) -> None:
        """See `Pipeline.proceed`; all ranks have as many batches under way."""
        ranks, pipelines, empty = self.ranks, self._pipelines, 0
        queue, places = pipelines[0].queue, pipelines[0].places
        while True:
            if any(rank._inside or rank._left for rank in ranks):
                ran = self._schedule(now)
                if len(queue) < places and (ran or any(rank._inside for rank in ranks)):
                    continue
            idle = all(each.plan is None for pipeline in pipelines for each in pipeline.queue)
            if not queue or (empty > places and idle):
                # What waits can only be let in by somebody else.
                for pipeline in pipelines:
                    pipeline.queue.clear()
                    pipeline.engine._rest()
                self._running = False
                return
            if queue[0].end > now:
                self._version += 1
                self.clock.post(queue[0].end, Kind.STEP_END, ranks[0].number, self._version, self._ended)
                return
            empty += all(pipeline.queue[0].plan is None for pipeline in pipelines)
            self._take(now)

    def _schedule(self, now: float) -> bool:
        """One batch of each rank; whether any computes something."""
        pipelines, free_at = self._pipelines, self._free_at
        batches = []
        for pipeline in pipelines:
            pipeline.engine._left = False
            batches.append(pipeline.decide(now))
        ready, others, last = now, 0.0, 0.0
        for pipeline, batch in zip(pipelines, batches, strict=True):
            if batch.plan is not None:
                ready = max(ready, pipeline.ready(batch, now))
                first, slowest = pipeline.shares(batch.plan)
                others, last = max(others, first), max(last, slowest)
        start, end = now, max(now, pipelines[0].queue[-1].end if pipelines[0].queue else 0.0)
        ran = any(batch.plan is not None for batch in batches)
        if ran:
            start = at = max(ready, free_at[0])
            for stage in range(len(free_at) - 1):
                at = free_at[stage] = max(at, free_at[stage]) + others
            end = free_at[-1] = max(at, free_at[-1]) + last
            self.busy += others + (last - others) / len(free_at)
            self.steps += 1
        for pipeline, batch in zip(pipelines, batches, strict=True):
            pipeline.send(batch, start, end)
            if batch.plan is not None:
                pipeline.engine.busy += others + (last - others) / len(free_at)
        return ran

    def _take(self, now: float) -> None:
        for pipeline in self._pipelines:
            pipeline.take(now)
