"""For tests of the simulator: a source whose times are exact in binary, and a scheduler that takes every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, Uncertainty
from vllm_suite.planner.sources.steps import DecodeLine, Steps


class ExactSource(LatencySource):
    """Seconds as a sum of multiples of powers of two, so that sums do not depend on their order.

    Args:
        fixed, token, pair, key, longest, shortest: seconds of a step, of a prompt token, of a query-key pair of a
            prompt, of a decoded context token, and of a token of the longest and the shortest decode context.
        holds: steps for which a decode line may be used.
        knee: from this sum of decode contexts on, a step takes a second more.
    """

    def __init__(
        self,
        fixed: float = 1.0,
        token: float = 0.125,
        *,
        pair: float = 0.0,
        key: float = 0.0,
        longest: float = 0.0,
        shortest: float = 0.0,
        holds: float = float("inf"),
        knee: float = float("inf"),
    ) -> None:
        self.fixed, self.token, self.pair, self.key = fixed, token, pair, key
        self.longest, self.shortest, self.holds, self.knee = longest, shortest, holds, knee
        self.name, self.uncertainty, self.outside = "exact", Uncertainty(0.0, "by definition"), Outside("refuse")

    def step_seconds(self, steps: Steps) -> float:
        if not steps.tokens:
            return 0.0
        seconds = self.fixed + self.token * steps.prefill_tokens + self.pair * steps.prefill_pairs
        seconds += self.key * steps.decode_context + (1.0 if steps.decode_context >= self.knee else 0.0)
        return float(seconds + self.longest * steps.decode_longest + self.shortest * steps.decode_shortest)

    def seconds(self, steps: Steps) -> FloatArray:
        return np.array([self.step_seconds(Steps(*row)) for row in np.stack(steps, axis=1).tolist()])

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        first = self.step_seconds(Steps(0, 0, 0, 0, sequences, context, longest, shortest))
        before_knee = -((context - self.knee) // sequences) if context < self.knee else float("inf")
        slope = self.key * sequences + self.longest + self.shortest
        return DecodeLine(first, slope, min(self.holds, before_knee))


@dataclass(eq=False)
class Request:
    """A request of `step_by_step`, with every token's time."""

    job: Job
    computed: int = 0
    blocks: int = 0
    scheduled: float = -1.0
    new: int = 0
    decodes: bool = False
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.times: list[float] = []

    @property
    def tokens(self) -> int:
        return self.job.prompt + len(self.times)


def step_by_step(jobs: Sequence[Job], source: LatencySource, limits: Limits) -> Iterator[Request]:
    """vLLM's scheduling loop request by request and step by step, for small traces; yields requests as they finish."""
    arriving = [Request(replace(job)) for job in jobs]
    waiting: list[Request] = []
    running: list[Request] = []
    free, now = limits.blocks, 0.0
    while arriving or waiting or running:
        if not waiting and not running:
            now = max(now, arriving[0].job.arrival)
        while arriving and arriving[0].job.arrival <= now:
            waiting.append(arriving.pop(0))
        budget, index, preempted, scheduled = limits.max_num_batched_tokens, 0, False, list[Request]()
        while index < len(running) and budget > 0:
            each = running[index]
            new = min(budget, each.tokens - each.computed)
            more = -(-(each.computed + new) // limits.block_size) - each.blocks
            while more > free:
                victim = running.pop()
                free += victim.blocks
                victim.blocks = victim.computed = 0
                victim.preemptions += 1
                victim.decodes = False
                waiting.insert(0, victim)
                preempted = True
                if victim is each:
                    break
            else:
                free, each.blocks, each.new, budget = free - more, each.blocks + more, new, budget - new
                scheduled.append(each)
                index += 1
        while waiting and not preempted and budget > 0 and len(running) < limits.max_num_seqs:
            each = waiting[0]
            each.computed = 0 if each.preemptions else each.job.cached
            new = min(budget, each.tokens - each.computed)
            more = -(-(each.computed + new) // limits.block_size)
            if (-(-each.tokens // limits.block_size) if limits.reserve_full_isl else more) > free:
                break
            running.append(waiting.pop(0))
            if each.scheduled < 0:
                each.scheduled = now
            free, each.blocks, each.new, budget = free - more, more, new, budget - new
            scheduled.append(each)
        steps = Steps.of(
            [(each.new, each.computed) for each in scheduled if not each.decodes],
            [each.computed + 1 for each in scheduled if each.decodes],
        )
        now += source.step_seconds(steps)
        for each in scheduled:
            each.computed += each.new
            if each.computed == each.tokens:
                each.times.append(now)
                each.decodes = True
                if len(each.times) == each.job.output:
                    running.remove(each)
                    free += each.blocks
                    yield each
    assert free == limits.blocks
