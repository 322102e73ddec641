"""What happens when an engine's step has ended: tokens come out, and jobs leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_suite.planner.simulator.jobs import Job, Keeper, Learner, SimulationError, WaitingQueue
from vllm_suite.planner.simulator.limits import Limits
from vllm_suite.planner.simulator.scheduler import SimulatedScheduler

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.steps import Plan


class Outlet(SimulatedScheduler):
    """A scheduler that is told when steps end.

    Attributes:
        number: unique among engines of a clock.
        finished: called with each job that has its last token here, and the time.
    """

    def __init__(
        self,
        limits: Limits,
        waiting: WaitingQueue | None,
        finished: Callable[[Job, float], None],
        number: int,
        *,
        prefill_only: bool = False,
    ) -> None:
        super().__init__(limits, waiting, prefill_only=prefill_only)
        self.finished, self.number = finished, number
        self._learner = self.waiting if isinstance(self.waiting, Learner) and not prefill_only else None
        self._keeper = self.waiting if isinstance(self.waiting, Keeper) and prefill_only else None
        # Jobs that left with blocks still to be fetched, by number, with prefix caching.
        self._holding: dict[int, tuple[Job, int]] = {}
        # Jobs that were accepted and have not left; and whether one left since the last batch was scheduled.
        self._inside, self._left = 0, False

    def _release(self, blocks: int, job: Job | None) -> None:
        """See `Engine.release`."""
        if blocks > self.kept:
            raise SimulationError(f"engine {self.number} keeps {self.kept} blocks, {blocks} were released")
        self.kept -= blocks
        if self.cache is None:
            self.free += blocks
        else:
            key = job.number if job else next(key for key, (_, held) in self._holding.items() if held == blocks)
            left, held = self._holding.pop(key)
            self._give_back(left, held, left.target, left=True)

    def _settle(self, flight: Plan, now: float) -> bool:
        """Tokens of a step come out; whether anybody left."""
        decoding, left = self.decoding, False
        # First tokens before ends: ahead, a job of one token is among those that decode.
        for job in flight.sampled or ():
            if job.first_token != job.first_token:
                job.first_token = now
            else:
                job.longest_gap = max(job.longest_gap, now - job.last_token)
        for job in decoding.complete(decoding.ended) if decoding.ready() else ():
            held = decoding.held(job)
            self._note_gap(job)
            decoding.leave(job)
            self._give_back(job, held, job.prompt + job.output - 1, left=True)
            self._done(job, now)
            left = True
        if decoding.ending or flight.leaving or decoding.late:
            left |= self._leave(flight, now)
        return left

    def _leave(self, flight: Plan, now: float) -> bool:
        """Jobs leave that do not decode any more, and those that lost their cache get the tokens under way."""
        decoding = self.decoding
        late, decoding.late = decoding.late, []
        for job in late:
            self._note_gap(job)
            job.last_token = now
            job.flying -= 1
            if job.generated == job.output:
                if self.cache is not None:
                    self.cache.forget(job)
                self._done(job, now)
        ending, decoding.ending = decoding.ending, []
        for job in ending:
            self._note_gap(job)
            self._give_back(job, job.held, job.prompt + job.output - 1, left=True)
            self._done(job, now)
        for job in flight.leaving:
            if self.prefill_only and job.generated < job.output:
                self.kept += job.held
                if self.cache is not None:
                    self._holding[job.number] = (job, job.held)
            else:
                self._give_back(job, job.held, job.prompt + job.output - 1, left=True)
            self._done(job, now)
        return bool(ending or flight.leaving)

    def _done(self, job: Job, now: float) -> None:
        job.last_token = now
        self.running.pop(job.number, None)
        self._inside -= 1
        self._left = True
        if self._reserving is not None:
            self._reserving.stopped(job)
        if self._learner is not None:
            self._learner.left(job, now)
        elif self._keeper is not None:
            self._keeper.forget(job)
        self.finished(job, now)
