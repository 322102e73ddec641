"""A prefill instance that runs ahead of its items: it computes a prompt up to the first one that is still under way.

As with the suite's connector (plugins/vllm_epd/consumer.py, manager.py) on vLLM's scheduler, 0.32: a chunk ends before
an item that is not there, a request that can compute nothing is passed over by those behind it, and nobody begins a
chunk of a single token before one.
"""

from __future__ import annotations

from typing import Any

from vllm_suite.planner.simulator.instances import Hosted, Leg
from vllm_suite.planner.simulator.jobs import Job

_ALL = 1 << 62


class Overlapping(Hosted):
    """A prefill instance with one pipeline stage. Several of its requests may be in the middle of their prompts."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        assert self.prefill_only
        assert self._pipeline is None
        self._gated = True

    def arrived(self, leg: Leg, key: int, now: float) -> None:
        """An item is there."""
        leg.pending = tuple(each for each in leg.pending if each[2] != key)
        if self._lockstep is not None:
            self._lockstep.awake(self, now)
        else:
            self._awake(now)

    def _stalled(self) -> bool:
        """See `Engine`; those that pause are among the running."""
        return len(self.waiting) > 0 or bool(self.running)

    def _open(self, job: Job, done: int) -> int:
        """See `SimulatedScheduler`: tokens before the first item that is under way. One alone is not begun with."""
        assert isinstance(job, Leg)
        for begin, end, _ in job.pending:
            if end > done:
                return begin - done if begin - done > 1 else 0
        return _ALL

    def _decide(self, now: float) -> bool:
        """See `SimulatedScheduler`. Nobody decodes here; who has all its prompt computed leaves with the step under
        way.
        """
        limits, preempted = self.limits, False
        budget, size = limits.max_num_batched_tokens, limits.block_size
        for job in list(self.running.values()):
            tokens = min(budget, job.target - job.done, self._open(job, job.done))
            if tokens < 1 or job.number not in self.running:
                continue
            blocks = -(-(job.done + tokens) // size) - job.held
            while blocks > self.free and job.number in self.running:
                self._yield(next(reversed(self.running.values())), now)
                preempted = True
            if job.number not in self.running:
                break
            self._take(job, tokens, blocks)
            budget -= tokens
        if not preempted and budget > 0 and len(self.waiting):
            self._admit(now, budget, self.free)
        return preempted

    def _yield(self, job: Job, now: float) -> None:
        """Preempt one. A token of it that is under way is dropped: the blocks that it would hand over are gone."""
        flight = self._flight
        if job.done == job.target:
            assert flight is not None
            job.generated -= 1
            flight.sampled = [each for each in flight.sampled or () if each is not job]
            flight.leaving = [each for each in flight.leaving if each is not job]
        self._partial = job
        self._evict(job, now)
