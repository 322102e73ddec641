"""Jumps over runs of decode steps give what a scheduler gives that takes every step, on random small traces."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from simulated import ExactSource, step_by_step

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Parallel, load
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.sources.base import LatencySource
from vllm_suite.planner.sources.roofline import RooflineSource

UNIT = 2.0**-6

sources = st.builds(
    ExactSource,
    fixed=st.sampled_from([UNIT, 1.0]),
    token=st.sampled_from([0.0, UNIT]),
    pair=st.sampled_from([0.0, UNIT / 4]),
    key=st.sampled_from([0.0, UNIT / 8]),
    longest=st.sampled_from([0.0, UNIT / 2]),
    shortest=st.sampled_from([0.0, UNIT]),
    holds=st.sampled_from([1.0, 2.5, float("inf")]),
    knee=st.sampled_from([30.0, float("inf")]),
)


@st.composite
def scenarios(draw: st.DrawFn) -> tuple[list[Job], Limits]:
    """Jobs and an engine in which each of them fits alone."""
    arrival, jobs = 0.0, []
    for number in range(draw(st.integers(1, 12))):
        arrival += UNIT * draw(st.sampled_from([0, 0, 1, 16, 64, 300, 5000]))
        prompt, output = draw(st.integers(1, 40)), draw(st.integers(1, 30))
        jobs.append(Job(number, arrival, prompt, output, cached=draw(st.sampled_from([0, prompt // 2, prompt - 1]))))
    size, seqs = draw(st.sampled_from([1, 2, 4, 5])), draw(st.integers(1, 6))
    least = max(-(-(job.prompt + job.output - 1) // size) for job in jobs)
    limits = Limits(
        least + draw(st.sampled_from([0, 1, 3, 10, 100])),
        size,
        seqs,
        seqs + draw(st.sampled_from([0, 1, 5, 30, 100])),
        draw(st.booleans()),
    )
    return jobs, limits


def both(jobs: list[Job], source: LatencySource, limits: Limits) -> tuple[dict[int, tuple[float, ...]], ...]:
    """By request: scheduled, first token, last token, longest gap, preemptions; from the simulator and step by step."""
    found: dict[int, tuple[float, ...]] = {}

    def finished(job: Job, now: float) -> None:
        assert job.number not in found
        assert now == job.last_token
        found[job.number] = (job.first_scheduled, job.first_token, now, job.longest_gap, job.preemptions)

    pool = simulate((replace(job) for job in jobs), source, limits, finished)
    assert pool.engines[0].free == limits.blocks
    assert not pool.engines[0].running
    expected = {
        each.job.number: (
            each.scheduled,
            each.times[0],
            each.times[-1],
            max((later - earlier for earlier, later in zip(each.times, each.times[1:], strict=False)), default=0.0),
            each.preemptions,
        )
        for each in step_by_step(jobs, source, limits)
    }
    return found, expected


@settings(max_examples=250, deadline=None)
@given(scenarios(), sources)
def test_jumps_equal_single_steps(scenario: tuple[list[Job], Limits], source: ExactSource) -> None:
    found, expected = both(*scenario[:1], source, scenario[1])
    event(f"preempted: {any(row[4] for row in expected.values())}")
    assert found == expected


def test_random_scenarios_preempt() -> None:
    # The property above would be empty without preemptions; a tight cache has them.
    jobs = [Job(number, 0.0, 10, 20) for number in range(6)]
    found, expected = both(jobs, ExactSource(), Limits(16, 4, 6, 32))
    assert found == expected
    assert sum(row[4] for row in found.values()) >= 5


@pytest.mark.parametrize("blocks", [120, 2000])
def test_jumps_equal_single_steps_with_the_roofline(blocks: int) -> None:
    source = RooflineSource(*load("meta-llama/Llama-3.1-8B"), Parallel(), cluster("1xH100-SXM"), max_tokens=2048)
    jobs = [Job(number, 0.037 * number, 90 + 31 * number % 700, 20 + 57 * number % 230) for number in range(40)]
    found, expected = both(jobs, source, Limits(blocks, 16, 16, 512))
    for number, row in expected.items():
        assert found[number] == pytest.approx(row, rel=1e-9, abs=1e-12), number
    assert (blocks == 120) == any(row[4] for row in expected.values())
