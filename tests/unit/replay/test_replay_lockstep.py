"""Data-parallel ranks in lockstep against as many of vLLM's schedulers that are stepped together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from core_loop import Core
from replay_engine import EngineSettings
from replay_traces import Row
from replay_workload import Room
from simulated import ExactSource

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.lockstep import Lockstep

# The second grows faster with its context than the first, so the slowest rank changes within runs of decode steps.
SOURCE = ExactSource(2.0**-7, 2.0**-14, key=2.0**-20)


def together(rows: Sequence[Row], settings: EngineSettings, ranks: int) -> list[Core]:
    """Requests dealt out to schedulers whose steps all end with the slowest one's; an idle one waits."""
    cores = [
        Core(rows, settings, lambda steps: [SOURCE.step_seconds(steps)], places=2 if settings.ahead else 1)
        for _ in range(ranks)
    ]
    arrived, now = 0, 0.0
    while arrived < len(rows) or any(core.unfinished for core in cores):
        if not any(core.unfinished or core.queue for core in cores):
            now = max(now, rows[arrived].arrival_s or 0.0)
        while arrived < len(rows) and (rows[arrived].arrival_s or 0.0) <= now:
            cores[arrived % ranks].add(arrived)
            arrived += 1
        heads = []
        for core in cores:
            core.now = core.last_end = now
            core.stages = []
            while core.turn():
                pass
            # Batches that are empty hold nobody up.
            while core.queue and not core.queue[0][1]:
                core.queue.popleft()
            heads += [core] if core.queue else []
        if not heads:
            continue
        now += max(core.seconds[0] for core in heads)
        for core in heads:
            core.now = now
            orders, names, samples, _ = core.queue[0]
            core.queue[0] = (orders, names, samples, now)
            del core.seconds[0]
            core.take()
    return cores


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("blocks", "budget", "gap"), [(2000, 512, 60), (110, 512, 60), (2000, 8192, 1500)])
def test_ranks_step_together(ahead: bool, blocks: int, budget: int, gap: int) -> None:
    draw, at, rows = random.Random(blocks + gap), 0.0, []
    for _ in range(50):
        at += draw.randrange(2 * gap) / 1024
        rows.append(Row(at, draw.randrange(1, 900), draw.choice([1, 2, *(draw.randrange(1, 300) for _ in range(4))])))
    settings = EngineSettings(room=Room(blocks=blocks, seqs=16), batched_tokens=budget, ahead=ahead)
    cores = together(rows, settings, 2)
    jobs = [Job(index, row.arrival_s or 0.0, row.prompt, row.output) for index, row in enumerate(rows)]
    clock = Clock()
    group, limits = Lockstep(clock), Limits(blocks - 1, 16, 16, budget, async_scheduling=ahead)
    ranks = [Engine(clock, SOURCE, limits, lambda job, now: None, number=number, lockstep=group) for number in range(2)]
    clock.feed(jobs, lambda job, now: ranks[job.number % 2].accept(job, now))
    clock.run()
    times = [cores[index % 2].served.times[index] for index in range(len(rows))]
    assert [(job.first_token, job.last_token) for job in jobs] == [(each[0], each[-1]) for each in times]
    gaps = [max((later - earlier for earlier, later in pairwise(each)), default=0.0) for each in times]
    assert [job.longest_gap for job in jobs] == pytest.approx(gaps, rel=1e-12)
    assert [rank.preemptions for rank in ranks] == [core.served.preemptions for core in cores]
    assert sum(rank.preemptions for rank in ranks) > 0 or blocks > 200
    assert max(rank.steps for rank in ranks) <= group.steps
    assert [rank.free for rank in ranks] == [blocks - 1] * 2
