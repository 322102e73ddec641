"""Data-parallel ranks of a mixture of experts: every step takes as long as that of the slowest rank.

Each rank is an `Engine` with its own scheduler and cache (vllm/v1/engine/core.py, `DPEngineCoreProc`, 0.32). The
experts are shared, so ranks compute their steps together, and one with nothing to do computes an empty one. The time of
a rank's step is what the source says for its own batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_suite.planner.simulator.clock import Clock, Kind
from vllm_suite.planner.simulator.staged import StagedRanks
from vllm_suite.planner.sources.steps import DecodeLine

if TYPE_CHECKING:
    from vllm_suite.planner.simulator.engine import Engine


class Lockstep:
    """Ranks that step together. Give it to each of them: ``Engine(..., lockstep=group)``.

    vLLM goes on with empty steps for a while after the last request has left, so that one that arrives then waits for
    the end of an empty step; that is left out.

    Attributes:
        ranks: in the order in which they were made.
        busy: seconds in steps.
        steps: that ended.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.ranks: list[Engine] = []
        self.busy, self.steps = 0.0, 0
        self._running = self._between = False
        self._active: list[Engine] = []
        self._pace = DecodeLine(0.0, 0.0)
        self._count, self._start, self._version = 0, 0.0, 0
        # With pipeline stages.
        self._staged: StagedRanks | None = None

    def join(self, rank: Engine) -> None:
        """A rank is made."""
        self.ranks.append(rank)
        if rank.source.stages > 1:
            self._staged = self._staged or StagedRanks(self.clock)
            self._staged.join(rank)

    def awake(self, rank: Engine, now: float) -> None:
        """A rank may be able to let a waiting job in."""
        if self._staged is not None:
            self._staged.awake(now)
        elif not self._running:
            self._running = self._between = True
            self._version += 1
            self.clock.post(now, Kind.WAKE, self.ranks[0].number, self._version, self._wake)
        elif not self._between:
            flight, plan = rank._flight, rank._plan
            if plan is not None and plan is not flight:
                plan.count = 1
            self._cut_short(now)

    def _cut_short(self, now: float) -> None:
        """End a run of steps with the one that is under way, where there is one."""
        if self._count < 2:
            return
        count = max(1, self._pace.within(now - self._start))
        while self._start + self._pace.total(count) < now:
            count += 1
        if count < self._count:
            self._post(count)

    def _post(self, count: int) -> None:
        self._count = count
        self._version += 1
        end = self._start + self._pace.total(count)
        self.clock.post(end, Kind.STEP_END, self.ranks[0].number, self._version, self._ended)

    def _wake(self, now: float, version: int) -> None:
        self._between = False
        self._begin(now)

    def _ended(self, now: float, version: int) -> None:
        if version != self._version:
            return
        self.busy += now - self._start
        self.steps += self._count
        self._between = True
        for rank in self._active:
            rank._count, rank._pace = self._count, self._pace
            rank._finish(now, rank._version)
        self._between = False
        self._begin(now)

    def _begin(self, now: float) -> None:
        """Start the next step, or a run of steps in which no rank's batch changes."""
        for rank in self.ranks:
            if rank._idle and rank._stalled():
                rank._idle = False
                rank._proceed(now)
        self._active = [rank for rank in self.ranks if not rank._idle]
        if not self._active:
            self._running = False
            self._count = 0
            return
        count, lines = 1 << 62, []
        for rank in self._active:
            flight = rank._flight
            assert flight is not None
            count = min(count, rank._count)
            lines.append(flight.line or DecodeLine(flight.seconds, 0.0))
        slowest = max(lines, key=lambda line: (line.seconds, line.slope))
        for line in lines:
            if count > 1 and line.slope > slowest.slope:
                # From there on another rank is the slowest.
                count = min(count, int((slowest.seconds - line.seconds) / (line.slope - slowest.slope)) + 1)
        self._pace, self._start = slowest, now
        self._post(count)
