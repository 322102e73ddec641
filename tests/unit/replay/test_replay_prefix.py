"""The simulated engine against vLLM's scheduler and KV cache manager: prefix caching, and scheduling a step ahead."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from core_loop import Served, drive
from replay_engine import EngineSettings
from replay_traces import Row, read_rows
from replay_workload import Room
from simulated import ExactSource

from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate

DATA = Path(os.environ.get("VLLM_SUITE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
# Powers of two, and arrivals that are multiples of one: sums are exact, and so are ties.
SOURCE = ExactSource(2.0**-7, 2.0**-14, key=2.0**-26)

# How steps follow one another: scheduled ahead or not, and whether the scheduler knows lengths.
MODES = {"in turn": (False, False), "ahead": (True, False), "ahead, lengths known": (True, True)}


def both(rows: Sequence[Row], limits: Limits) -> tuple[Engine, list[Job], Served]:
    """Rows through the simulator and through vLLM's scheduler, which has one block more for itself."""
    settings = EngineSettings(
        room=Room(blocks=limits.blocks + 1, seqs=limits.max_num_seqs),
        batched_tokens=limits.max_num_batched_tokens,
        ahead=limits.async_scheduling,
        prefix_caching=limits.prefix_caching,
    )
    served = drive(
        rows,
        settings,
        lambda steps: [SOURCE.step_seconds(steps)],
        places=2 if limits.async_scheduling else 1,
        known=limits.by_length,
    )
    jobs = [
        Job(index, row.arrival_s or 0.0, row.prompt, row.output, prefix=row.prefix) for index, row in enumerate(rows)
    ]
    (engine,) = simulate(jobs, SOURCE, limits, lambda job, now: None).engines
    return engine, jobs, served


def assert_same(engine: Engine, jobs: list[Job], served: Served) -> None:
    assert [(job.first_token, job.last_token) for job in jobs] == [(each[0], each[-1]) for each in served.times]
    assert [job.longest_gap for job in jobs] == [
        max((later - earlier for earlier, later in pairwise(each)), default=0.0) for each in served.times
    ]
    assert (engine.preemptions, engine.free) == (served.preemptions, engine.limits.blocks)
    # Ahead, the last request leaves a step behind that the loop does not wait for.
    assert engine.steps - served.steps in (0, 1)
    if engine.cache is not None:
        assert [job.found for job in jobs] == served.found


def shared_prefixes(count: int, seed: int, gap: int, longest: int) -> list[Row]:
    """Conversations over few contents: prompts that end on, before and after the end of a block of 512 tokens."""
    draw, at, rows = random.Random(seed), 0.0, []
    for _ in range(count):
        at += draw.randrange(2 * gap) / 1024
        depth = draw.randrange(4)
        prefix = tuple(draw.randrange(6) + 100 * index for index in range(depth))
        more = draw.choice([0, 0, -draw.randrange(500), draw.randrange(200)])
        rows.append(Row(at, max(5, 512 * depth + more), draw.randrange(1, longest), prefix=prefix))
    return rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("blocks", [130, 220, 800])
def test_shared_prefixes(mode: str, blocks: int) -> None:
    ahead, known = MODES[mode]
    limits = Limits(blocks, 16, 16, 600, async_scheduling=ahead, by_length=known, prefix_caching=True)
    engine, jobs, served = both(shared_prefixes(150, blocks, 100, 100), limits)
    assert_same(engine, jobs, served)
    assert sum(served.found) > 10_000
    assert (served.preemptions > 0) == (blocks < 400)


@pytest.mark.parametrize("mode", list(MODES)[1:])
@pytest.mark.parametrize(
    ("blocks", "budget", "gap"), [(2000, 128, 150), (150, 512, 100), (120, 64, 300), (2000, 8192, 3000)]
)
def test_ahead(mode: str, blocks: int, budget: int, gap: int) -> None:
    draw, at, rows = random.Random(blocks + budget), 0.0, []
    for _ in range(60):
        at += draw.randrange(gap) / 1024
        rows.append(Row(at, draw.randrange(1, 900), draw.choice([1, 2, *(draw.randrange(1, 300) for _ in range(4))])))
    for caching in (False, True):
        limits = Limits(blocks, 16, 16, budget, async_scheduling=True, by_length=MODES[mode][1], prefix_caching=caching)
        engine, jobs, served = both(rows, limits)
        assert_same(engine, jobs, served)
        assert (served.preemptions > 0) == (blocks < 200)


def test_mooncake() -> None:
    path = DATA / "traces" / "mooncake_synthetic_trace.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}; set VLLM_SUITE_DATA")
    rows = [replace(row, arrival_s=round((row.arrival_s or 0.0) * 1024) / 1024) for row in read_rows(path)[:300]]
    limits = Limits(40_000, 16, 64, 8192, async_scheduling=True, prefix_caching=True)
    engine, jobs, served = both(rows, limits)
    assert_same(engine, jobs, served)
    print(f"{sum(served.found)} of {sum(row.prompt for row in rows)} prompt tokens found")
    assert sum(served.found) > 50_000
