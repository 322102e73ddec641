"""The simulated engine scheduled ahead, with prefix caching, with pipeline stages and in lockstep: worked out by hand,
and with jumps over runs of steps against every step by itself. Equality with vLLM is in tests/unit/replay.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import ExactSource

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.imbalance import Imbalanced
from vllm_suite.planner.simulator.jobs import Job, SimulationError
from vllm_suite.planner.simulator.lockstep import Lockstep
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.sources.steps import Steps

# One second a step and an eighth for each prompt token.
SOURCE = ExactSource(1.0, 0.125)


class Staged(ExactSource):
    """Stages of equal length."""

    def __init__(self, stages: int, holds: float = float("inf")) -> None:
        super().__init__(1.0, 0.125, key=2.0**-10, holds=holds)
        self.stages = stages


def run(jobs: list[Job], limits: Limits, source: ExactSource = SOURCE) -> Engine:
    return simulate(jobs, source, limits, lambda job, now: None).engines[0]


def ahead(known: bool = False, **more: int) -> Limits:
    return Limits(100, 4, 4, 8, async_scheduling=True, by_length=known, **more)


@pytest.mark.parametrize(("known", "steps"), [(False, 4), (True, 3)])
def test_an_end_that_has_to_be_seen_costs_a_step_ahead(known: bool, steps: int) -> None:
    job = Job(0, 0.0, 8, 3)
    engine = run([job], ahead(known))
    # The prompt until 2, two tokens until 4. Where the end is seen at 4, another step is under way by then.
    assert (job.first_token, job.last_token, engine.steps, engine.busy) == (2.0, 4.0, steps, 1.0 + steps)
    assert engine.free == 100


def test_ahead_an_arrival_waits_for_the_step_that_was_decided_on() -> None:
    first, second = Job(0, 0.0, 8, 20), Job(1, 2.5, 7, 1)
    run([first, second], ahead())
    # Steps end at 2, 3 and 4. The one until 4 was decided on at 2; at 3 the one after it is, which takes 1.875 s.
    assert (second.first_scheduled, second.first_token) == (3.0, 5.875)


def test_ahead_a_place_is_free_one_step_later() -> None:
    starts = []
    for async_scheduling in (False, True):
        jobs = [Job(0, 0.0, 8, 3), Job(1, 0.0, 8, 3)]
        run(jobs, Limits(100, 4, 1, 8, async_scheduling=async_scheduling, by_length=True))
        starts.append((jobs[0].last_token, jobs[1].first_token))
    # The first leaves at 4; what is decided on then begins at once, as nothing could be decided on at 3.
    assert starts == [(4.0, 6.0), (4.0, 6.0)]
    jobs = [Job(0, 0.0, 8, 3), Job(1, 0.0, 8, 3)]
    run(jobs, Limits(100, 4, 1, 8, async_scheduling=True))
    assert jobs[1].first_token == 7.0


def test_ahead_host_time_is_hidden_until_the_host_is_the_slower_one() -> None:
    class Hosted(ExactSource):
        host = 0.0

        def host_seconds(self, sequences: int) -> float:
            return self.host

    source, ends = Hosted(1.0, 0.0), []
    for source.host in (0.0, 0.25, 0.75):
        job = Job(0, 0.0, 8, 9)
        run([job], ahead(True), source)
        ends.append(job.last_token)
    assert ends == [9.0, 9 * 0.75, 9 * 0.75]
    job = Job(0, 0.0, 8, 9)
    run([job], Limits(100, 4, 4, 8), source)
    assert job.last_token == 9.0


def shared(number: int, arrival: float, ids: tuple[int, ...], prompt: int, output: int = 1) -> Job:
    return Job(number, arrival, prompt, output, prefix=ids, block=8)


def cached(blocks: int) -> Limits:
    return Limits(blocks, 4, 4, 64, prefix_caching=True)


def test_equal_blocks_are_found_and_the_last_token_is_computed_again() -> None:
    jobs = [
        shared(0, 0.0, (1, 2), 16),
        shared(1, 100.0, (1, 2), 16),  # all there: the last block is computed again
        shared(2, 200.0, (1, 2, 3), 20),
        shared(3, 300.0, (1, 3), 16),
        shared(4, 400.0, (2,), 8),  # its content came after another one
    ]
    engine = run(jobs, cached(100))
    assert [job.found for job in jobs] == [0, 12, 16, 8, 0]
    assert [job.ttft for job in jobs] == [3.0, 1.5, 1.5, 2.0, 2.0]
    assert engine.free == 100


def test_blocks_are_shared_while_they_are_held() -> None:
    jobs = [shared(0, 0.0, (1, 2), 17, 30), shared(1, 10.0, (1, 2), 17, 3)]
    seen = []

    def watch(engine: Engine, *_: object) -> None:
        seen.append(100 - engine.free)

    simulate(jobs, SOURCE, cached(100), lambda job, now: None, observer=watch)
    # Four shared blocks, one of the first job's own and, as it goes on, more; not twice the prompt.
    assert max(seen) < 2 * 5 + 8
    assert jobs[1].found == 16


def test_the_least_recently_used_goes_first_and_of_one_prompt_its_end() -> None:
    # Three prompts of 4 blocks in a cache of 12, then one of 2 blocks that nobody shares.
    jobs = [shared(number, 100.0 * number, (number, 10 + number), 17) for number in range(2)]
    jobs += [Job(2, 200.0, 17, 1), shared(3, 300.0, (0, 10), 17), shared(4, 400.0, (1, 11), 17)]
    run(jobs, cached(10))
    # The first prompt's 5 blocks go to the second and third, of which 5 + 5 were taken; that of the second stays.
    assert [job.found for job in jobs][:3] == [0, 0, 0]
    assert jobs[3].found < 16
    assert jobs[4].found <= 16
    jobs = [shared(0, 0.0, (1, 2), 16), Job(1, 100.0, 24, 1), shared(2, 200.0, (1, 2), 17)]
    run(jobs, cached(8))
    # 8 blocks, 4 of them with contents: the other job takes the 4 blank ones and the prompt's last two.
    assert jobs[2].found == 8


def test_a_preempted_job_finds_its_own_blocks() -> None:
    found = []
    for caching in (False, True):
        jobs = [Job(0, 0.0, 4, 8), Job(1, 0.0, 4, 8)]
        engine = run(jobs, Limits(4, 4, 4, 8, prefix_caching=caching))
        assert engine.preemptions == 1
        found.append(jobs[1].last_token)
    # Without, 9 tokens are computed anew from 9 on, in two steps. With it, the other job took the block with the last
    # of them, and 4 tokens are found: one step for 5, and two more tokens.
    assert found == [14.125, 9.0 + 1.625 + 2.0]


def test_an_id_stands_for_whole_blocks() -> None:
    with pytest.raises(SimulationError, match="request 7: an id of its prefix stands for 10 tokens"):
        run([Job(7, 0.0, 16, 1, prefix=(1,), block=10)], cached(100))


def test_memory_of_the_prefix_cache_follows_the_cache() -> None:
    peaks = []
    for count in (300, 3000):
        tracemalloc.start()
        simulate(
            (shared(number, 4.0 * number, (number // 2, number), 20, 3) for number in range(count)),
            SOURCE,
            cached(60),
            lambda job, now: None,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]


def test_two_stages_are_full_with_two_groups_and_half_empty_with_one() -> None:
    busy = []
    for count in (1, 2):
        # The second comes when the first is under way, so they never share a batch.
        jobs = [Job(number, 0.5 * number, 8, 60) for number in range(count)]
        engine = run(jobs, Limits(100, 4, 4, 8), Staged(2))
        busy.append(engine.busy / max(job.last_token for job in jobs))
        assert jobs[0].tpot == pytest.approx(jobs[-1].tpot, rel=0.05)
    assert busy[0] == pytest.approx(0.5, rel=1e-9)
    assert busy[1] > 0.95


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("stages", [2, 3])
def test_a_token_is_not_begun_before_the_last_one_is_known(stages: int, count: int) -> None:
    gaps = []
    for limits in (Limits(100, 4, 4, 8), ahead()):
        # Long enough that runs of decode steps are taken at once, and short enough that they are not.
        for output in (4, 60):
            jobs = [Job(number, 0.5 * number, 8, output) for number in range(count)]
            run(jobs, limits, Staged(stages))
            gaps += [job.tpot for job in jobs]
    assert min(gaps) >= 1.0


def test_a_prefill_pipeline_waits_for_what_has_to_be_fetched() -> None:
    clock, jobs = Clock(), [Job(number, 0.0, 8, 3) for number in range(2)]

    def hand_over(job: Job, now: float) -> None:
        clock.post(now + 30.0, 3, job.number, 0, lambda then, version: engine.release(2, then))

    engine = Engine(clock, Staged(2), Limits(2, 4, 4, 16), hand_over, prefill_only=True)
    clock.feed(jobs, engine.accept)
    clock.run()
    assert [job.first_token for job in jobs] == [2.0, 34.0]
    assert (engine.free, engine.kept) == (2, 0)


def test_ranks_in_lockstep_take_the_slowest_ones_time() -> None:
    clock, jobs = Clock(), [Job(0, 0.0, 8, 3), Job(1, 0.0, 80, 1)]
    group = Lockstep(clock)
    ranks = [
        Engine(clock, SOURCE, Limits(100, 4, 4, 80), lambda job, now: None, number=n, lockstep=group) for n in (0, 1)
    ]
    clock.feed(jobs, lambda job, now: ranks[job.number].accept(job, now))
    clock.run()
    # 2 s and 11 s of prompts together, then two steps of the first alone.
    assert [(job.first_token, job.last_token) for job in jobs] == [(11.0, 13.0), (11.0, 11.0)]
    assert (group.steps, group.busy) == (3, 13.0)


def test_batches_of_ranks_hold_a_stage_as_long_as_the_slowest() -> None:
    clock, jobs = Clock(), [Job(0, 0.0, 8, 3), Job(1, 0.0, 80, 1)]
    group, source = Lockstep(clock), Staged(2)
    ranks = [
        Engine(clock, source, Limits(100, 4, 4, 80), lambda job, now: None, number=n, lockstep=group) for n in (0, 1)
    ]
    clock.feed(jobs, lambda job, now: ranks[job.number].accept(job, now))
    clock.run()
    # Prompts as above, in two stages one after the other; then the first alone, with contexts of 9 and 10 keys.
    assert [job.first_token for job in jobs] == [11.0, 11.0]
    assert [job.last_token for job in jobs] == [13.0 + 19 / 1024, 11.0]


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[Job], Limits]:
    arrival, jobs = 0.0, []
    for number in range(draw(st.integers(1, 10))):
        arrival += draw(st.sampled_from([0.0, 0.5, 1.0, 7.25, 40.0]))
        prompt = draw(st.integers(1, 40))
        ids = tuple(draw(st.lists(st.integers(0, 1), max_size=4)))
        jobs.append(Job(number, arrival, prompt, draw(st.integers(1, 30)), prefix=ids, block=8))
    limits = Limits(
        max(-(-(job.prompt + job.output) // 4) for job in jobs) + draw(st.sampled_from([0, 1, 3, 30])),
        4,
        6,
        draw(st.sampled_from([6, 11, 64])),
        async_scheduling=draw(st.booleans()),
        by_length=draw(st.booleans()),
        prefix_caching=draw(st.booleans()),
    )
    return jobs, limits


@settings(max_examples=150, deadline=None)
@given(traces(), st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]))
def test_jumps_equal_single_steps(trace: tuple[list[Job], Limits], shape: tuple[int, int]) -> None:
    found = []
    for holds in (1.0, float("inf")):
        jobs, (stages, ranks) = [replace(job) for job in trace[0]], shape
        pool = simulate(jobs, Staged(stages, holds), trace[1], lambda job, now: None, ranks=ranks)
        found.append([(job.first_token, job.last_token, job.longest_gap, job.preemptions, job.found) for job in jobs])
        assert all(engine.free == trace[1].blocks and not engine.running for engine in pool.engines)
        assert all(job.first_token <= job.last_token for job in jobs)
    assert [row[3:] for row in found[0]] == [row[3:] for row in found[1]]
    assert [row[:3] for row in found[0]] == [pytest.approx(row[:3], rel=1e-9) for row in found[1]]


def test_an_uneven_step_takes_the_same_time_whoever_asks() -> None:
    source = Imbalanced(ExactSource(1.0, 0.0), ExactSource(1.25, 0.0), mean=1.25, deviation=0.2, seed=3)
    steps = [Steps.of(chunks=[(tokens, 0)]) for tokens in range(1, 2000)]
    single = [source.step_seconds(each) for each in steps]
    assert source.seconds(Steps(*np.array([steps[76], steps[9]]).T)).tolist() == [single[76], single[9]]
    # The excess is log-normal with the mean and deviation asked for: the time is 1 + excess here.
    mean = sum(single) / len(single)
    deviation = (sum((each - mean) ** 2 for each in single) / len(single)) ** 0.5
    assert (mean, deviation) == (pytest.approx(1.25, rel=0.02), pytest.approx(0.2, rel=0.1))
    assert min(single) > 1.0
    other = Imbalanced(ExactSource(1.0, 0.0), ExactSource(1.25, 0.0), mean=1.25, deviation=0.2, seed=4)
    assert other.step_seconds(steps[0]) != single[0]
    line = source.decode_line(4, 100)
    assert (line.seconds, line.steps) == (source.step_seconds(Steps.of(contexts=[25] * 4)), 16)
    with pytest.raises(SourceError, match="has to be above 1"):
        Imbalanced(SOURCE, SOURCE, mean=1.0, deviation=0.1)


def test_the_slowest_rank_changes_within_a_run() -> None:
    # One sequence of 40 tokens against three of 4, whose keys become more after some steps.
    found = []
    for holds in (1.0, float("inf")):
        source = ExactSource(1.0, 0.0, key=0.25, holds=holds)
        jobs = [Job(0, 0.0, 40, 40), *(Job(number, 0.0, 4, 40) for number in (1, 2, 3))]
        clock = Clock()
        group, limits = Lockstep(clock), Limits(100, 4, 4, 80)
        ranks = [Engine(clock, source, limits, lambda job, now: None, number=n, lockstep=group) for n in (0, 1)]
        clock.feed(jobs, lambda job, now: ranks[min(job.number, 1)].accept(job, now))  # noqa: B023
        clock.run()
        found.append([(job.first_token, job.last_token, job.longest_gap) for job in jobs])
    assert found[0] == found[1]


def test_of_a_prompt_that_was_shared_in_part_the_end_goes_first() -> None:
    # Ids of two blocks; the second job takes part in the first block alone, which cuts the run of its id in two.
    jobs = [
        shared(0, 0.0, (1, 2), 17, 9),
        shared(1, 4.0, (1,), 5, 2),
        Job(2, 100.0, 28, 1),
        shared(3, 200.0, (1, 2), 17),
    ]
    run(jobs, cached(8))
    # The third job takes seven of eight blocks; the one that is left is the first of the prompt.
    assert (jobs[1].found, jobs[3].found) == (4, 4)
