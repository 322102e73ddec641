"""Data-parallel ranks with pipeline stages against as many of vLLM's schedulers whose batches go through together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from core_loop import Core
from replay_engine import EngineSettings
from replay_traces import Row
from replay_workload import Room
from test_replay_pipeline import Staged

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.lockstep import Lockstep
from vllm_suite.planner.sources.steps import Steps


def together(rows: Sequence[Row], settings: EngineSettings, source: Staged, ranks: int, known: bool) -> list[Core]:
    """Requests dealt out to schedulers; the n-th batches of all hold each stage as long as the slowest of them."""
    stages, taken = source.stages, dict[int, list[float]]()
    places = stages + settings.ahead

    def times(rank: int, steps: Steps) -> list[float]:
        taken[rank] = source.times(steps)
        return taken[rank]

    def core(rank: int) -> Core:
        def of(steps: Steps) -> list[float]:
            return times(rank, steps)

        return Core(rows, settings, of, places=places, stagger=stages if settings.ahead else 1, known=known)

    cores, free_at = [core(rank) for rank in range(ranks)], [0.0] * stages
    arrived, now, end = 0, 0.0, 0.0

    def round_() -> bool:
        """A batch of each; whether any computes something."""
        nonlocal end
        taken.clear()
        ready = now
        for index, one in enumerate(cores):
            one.now, one.last_end, one.stages = now, now, [0.0] * stages
            before = len(one.queue)
            if one.scheduler.has_requests():
                one.turn()
            if len(one.queue) == before:
                one.queue.append((None, [], [], now))
            if index in taken:
                ready = max(ready, one.stages[0] - taken[index][0])
        end = max(now, end)
        if taken:
            at = ready
            for stage in range(stages):
                at = free_at[stage] = max(at, free_at[stage]) + max(each[stage] for each in taken.values())
            end = at
        for index, one in enumerate(cores):
            orders, names, samples, _ = one.queue[-1]
            one.queue[-1] = (orders, names, samples, end)
            if index in taken:
                one.known_at.update((name, end) for name, token in zip(names, samples, strict=True) if token)
        return bool(taken)

    while arrived < len(rows) or any(core.unfinished for core in cores):
        if not any(core.unfinished or core.queue for core in cores):
            now = max(now, rows[arrived].arrival_s or 0.0)
        while arrived < len(rows) and (rows[arrived].arrival_s or 0.0) <= now:
            cores[arrived % ranks].add(arrived)
            arrived += 1

        def wanted() -> bool:
            return any(core.scheduler.has_requests() for core in cores)

        if wanted():
            ran = round_()
            if len(cores[0].queue) < places and (ran or wanted()):
                continue
        if not cores[0].queue:
            continue
        now = max(now, cores[0].queue[0][3])
        for one in cores:
            one.now = now
            if one.queue[0][0] is None:
                one.queue.popleft()
            else:
                one.take()
    return cores


CASES: dict[str, tuple[int, int, int]] = {
    # blocks, budget, mean gap in units of 1/1024 s
    "many": (2000, 512, 25),
    "cache": (110, 512, 30),
    "idle": (2000, 8192, 1500),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("stages", "ahead", "known"), [(2, False, False), (2, True, False), (3, True, True)])
def test_batches_of_all_ranks_go_through_the_stages_together(case: str, stages: int, ahead: bool, known: bool) -> None:
    blocks, budget, gap = CASES[case]
    draw, at, rows = random.Random(case), 0.0, []
    for _ in range(30):
        at += draw.randrange(2 * gap) / 1024
        rows.append(Row(at, draw.randrange(1, 900), draw.choice([1, 2, *(draw.randrange(1, 150) for _ in range(4))])))
    settings = EngineSettings(room=Room(blocks=blocks, seqs=16), batched_tokens=budget, ahead=ahead)
    source = Staged(stages)
    cores = together(rows, settings, source, 2, known)
    jobs = [Job(index, row.arrival_s or 0.0, row.prompt, row.output) for index, row in enumerate(rows)]
    clock = Clock()
    group, limits = Lockstep(clock), Limits(blocks - 1, 16, 16, budget, async_scheduling=ahead, by_length=known)
    more: dict[str, Any] = {"lockstep": group}
    ranks = [Engine(clock, source, limits, lambda job, now: None, number=number, **more) for number in range(2)]
    clock.feed(jobs, lambda job, now: ranks[job.number % 2].accept(job, now))
    clock.run()
    times = [cores[index % 2].served.times[index] for index in range(len(rows))]
    assert [(job.first_token, job.last_token) for job in jobs] == [(each[0], each[-1]) for each in times]
    gaps = [max((later - earlier for earlier, later in pairwise(each)), default=0.0) for each in times]
    assert [job.longest_gap for job in jobs] == pytest.approx(gaps, rel=1e-12)
    assert [rank.preemptions for rank in ranks] == [core.served.preemptions for core in cores]
    assert sum(rank.preemptions for rank in ranks) > 0 or blocks > 200
    assert [rank.steps for rank in ranks] == [core.served.steps for core in cores]
    assert [rank.free for rank in ranks] == [blocks - 1] * 2
