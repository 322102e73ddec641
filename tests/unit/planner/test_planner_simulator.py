"""The simulated engine: schedules worked out by hand, a queueing formula, determinism, what is conserved."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator

import pytest
from simulated import ExactSource

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.jobs import Job, SimulationError
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.simulator.results import Quantiles, Records, Summary
from vllm_suite.planner.sources.linear import distserve
from vllm_suite.planner.sources.steps import DecodeLine, Steps

# One second a step and an eighth for each prompt token.
SOURCE = ExactSource(1.0, 0.125)


def poisson(count: int, rate: float, seed: int, prompt: int = 512, output: int = 1) -> Iterator[Job]:
    draw, now = random.Random(seed), 0.0
    for number in range(count):
        now += draw.expovariate(rate)
        yield Job(number, now, prompt, output)


def run(jobs: list[Job], limits: Limits) -> list[Job]:
    simulate(jobs, SOURCE, limits, lambda job, now: None)
    return jobs


def test_chunks_run_beside_decode() -> None:
    first, second = run([Job(0, 0.0, 4, 5), Job(1, 0.0, 20, 2)], Limits(100, max_num_seqs=4, max_num_batched_tokens=8))
    # Prompt tokens of the steps: 4 + 4, then 7, 7 and 2 beside a decoded one, then none: 2, 1.875, 1.875, 1.25, 1 s.
    assert (first.first_token, first.last_token, first.longest_gap) == (2.0, 8.0, 1.875)
    assert (first.gaps, first.tpot) == (4, 1.5)
    assert (second.first_scheduled, second.first_token, second.last_token) == (0.0, 7.0, 8.0)


def test_max_num_seqs_keeps_a_job_waiting() -> None:
    first, second = run([Job(0, 0.0, 8, 3), Job(1, 0.0, 8, 3)], Limits(100, max_num_seqs=1, max_num_batched_tokens=8))
    assert (first.first_token, first.last_token) == (2.0, 4.0)
    assert (second.first_scheduled, second.first_token, second.last_token) == (4.0, 6.0, 8.0)


def test_an_arrival_joins_at_the_end_of_the_step_under_way() -> None:
    limits = Limits(100, max_num_seqs=2, max_num_batched_tokens=8)
    _, second = run([Job(0, 0.0, 8, 10), Job(1, 4.5, 8, 1)], limits)
    # Steps end at 2, 3, 4 and 5; then 7 tokens of the prompt, then the last one.
    assert (second.first_scheduled, second.first_token) == (5.0, 8.0)
    _, second = run([Job(0, 0.0, 8, 10), Job(1, 4.0, 8, 1)], limits)
    assert second.first_scheduled == 4.0


def test_the_last_admitted_gives_its_blocks_and_is_computed_again() -> None:
    limits = Limits(4, 4, max_num_seqs=4, max_num_batched_tokens=8)
    first, second = run([Job(0, 0.0, 4, 8), Job(1, 0.0, 4, 8)], limits)
    # Both prompts until 2; four steps fill the 4 blocks; the first needs a third one and takes it, and ends at 9.
    assert (first.first_token, first.last_token, first.preemptions) == (2.0, 9.0, 0)
    # The second had 5 tokens at 6. Its 9 tokens need 3 blocks, free at 9: 8 in one step, 1 in another, then 2 steps.
    assert (second.preemptions, second.first_token, second.last_token) == (1, 2.0, 14.125)
    assert second.longest_gap == 12.125 - 6.0


def test_a_prefill_engine_keeps_blocks_until_they_are_fetched() -> None:
    # Two engines on one clock. Fetching takes 3 s; the prefill engine has room for one prompt at a time.
    clock, jobs = Clock(), [Job(number, 0.0, 8, 3) for number in range(2)]
    limits = Limits(2, 4, max_num_seqs=4, max_num_batched_tokens=16)

    def hand_over(job: Job, now: float) -> None:
        job.cached, blocks = job.prompt, job.held

        def fetched(then: float, version: int) -> None:
            prefill.release(blocks, then)
            decode.accept(job, then)

        clock.post(now + 3.0, 3, job.number, 0, fetched)

    prefill = Engine(clock, SOURCE, limits, hand_over, number=0, prefill_only=True)
    decode = Engine(clock, SOURCE, Limits(100, 4), lambda job, now: None, number=1)
    clock.feed(jobs, prefill.accept)
    clock.run()
    # The first prompt until 2, fetched at 5; the second until 7, fetched at 10. The second token's step computes one
    # token after the 8 that came over, for 1.125 s.
    assert [(job.first_token, job.last_token, job.longest_gap) for job in jobs] == [
        (2.0, 7.125, 4.125),
        (7.0, 12.125, 4.125),
    ]
    assert (prefill.free, prefill.kept, decode.free) == (2, 0, 100)
    with pytest.raises(SimulationError, match="keeps 0 blocks, 1 were released"):
        prefill.release(1, clock.now)


def test_cached_tokens_are_not_computed() -> None:
    (job,) = run([Job(0, 1.0, 8, 1, cached=6)], Limits(10))
    assert job.first_token == 1.0 + 1.25


def test_a_tight_cache_holds_back_whole_sequences_or_first_chunks() -> None:
    starts = []
    for whole in (True, False):
        limits = Limits(5, 4, max_num_seqs=2, max_num_batched_tokens=8, reserve_full_isl=whole)
        starts.append(run([Job(0, 0.0, 4, 6), Job(1, 0.0, 17, 1)], limits)[1].first_scheduled)
    # Alone, the first job takes 1.5 s for its prompt and 5 s for the other tokens.
    assert starts == [6.5, 0.0]


@pytest.mark.parametrize(("load", "traces"), [(0.2, 1), (0.5, 1), (0.7, 4)])
def test_prefill_alone_is_an_m_d_1_queue(load: float, traces: int) -> None:
    # DistServe's equation 1: TTFT = D + R D² / (2 (1 - R D)); D is its own latency of OPT-13B on an A100. The mean of
    # one random trace of 20,000 has a standard error of 0.7 % at a load of 0.5 and of 1.8 % at 0.7, hence four there.
    source = distserve("facebook/opt-13b", 1)
    duration = source.step_seconds(Steps.of([(512, 0)]))
    rate, summary = load / duration, Summary()
    for seed in range(traces):
        simulate(poisson(20_000, rate, seed), source, Limits(100, max_num_seqs=1), summary)
    expected = duration + rate * duration**2 / (2 * (1 - rate * duration))
    assert summary.ttft.count == 20_000 * traces
    assert summary.ttft.mean == pytest.approx(expected, rel=0.03)


def test_prefill_alone_follows_lindleys_recursion() -> None:
    records, jobs = Records(), list(poisson(2000, 0.8, seed=3))
    simulate(jobs, ExactSource(1.0, 0.0), Limits(100, max_num_seqs=1), records)
    free = 0.0
    for job in jobs:
        free = max(free, job.arrival) + 1.0
        assert job.first_token == pytest.approx(free, rel=1e-12)
    assert records["number"].tolist() == list(range(2000))


def mixed(count: int, seed: int) -> Iterator[Job]:
    draw, now = random.Random(seed), 0.0
    for number in range(count):
        now += draw.choice([0.0, 0.5, 4.0])
        prompt = draw.randrange(1, 60)
        yield Job(number, now, prompt, draw.randrange(1, 40), cached=draw.randrange(prompt))


def test_runs_are_deterministic() -> None:
    found = []
    for _ in range(2):
        records = Records()
        simulate(mixed(400, 5), SOURCE, Limits(60, 4, 8, 64), records, engines=3)
        found.append({name: column.tobytes() for name, column in records.columns.items()})
    assert found[0] == found[1]
    assert sum(records["preemptions"]) > 0


def test_tokens_add_up() -> None:
    jobs, computed, decoded, busy = list(mixed(300, 9)), 0, 0, 0.0

    def watch(engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None) -> None:
        nonlocal computed, decoded, busy
        computed += steps.prefill_tokens
        decoded += steps.decode_sequences * count
        busy += end - start

    records = Records()
    pool = simulate(jobs, SOURCE, Limits(4000, 4, 8, 64), records, observer=watch)
    assert sorted(records["number"]) == list(range(300))
    assert computed == sum(job.prompt - job.cached for job in jobs)
    assert decoded == sum(records["gaps"]) == sum(job.output - 1 for job in jobs)
    assert busy == pool.engines[0].busy
    for job in jobs:
        assert job.arrival <= job.first_scheduled < job.first_token <= job.last_token


def test_an_idle_engine_gets_the_next_job() -> None:
    jobs = [Job(0, 0.0, 8, 9), Job(1, 0.0, 8, 9), Job(2, 3.0, 8, 1)]
    pool = simulate(jobs, SOURCE, Limits(100, max_num_seqs=4), lambda job, now: None, engines=3)
    assert [engine.steps for engine in pool.engines] == [9, 9, 1]


def test_memory_does_not_grow_with_the_trace() -> None:
    peaks = []
    for count in (500, 3000):
        # Finer bins take longer to be met once each.
        summary = Summary(ttft=Quantiles(0.1), tpot=Quantiles(0.1), longest_gap=Quantiles(0.1), latency=Quantiles(0.1))
        tracemalloc.start()
        simulate(poisson(count, 0.3, 1, 16, 8), SOURCE, Limits(400), summary)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0]


def test_quantiles_are_near() -> None:
    draw, sketch = random.Random(1), Quantiles(0.001)
    values = sorted(draw.lognormvariate(-3, 2) for _ in range(5000))
    for value in values:
        sketch.add(value)
    for q in (0.0, 0.01, 0.5, 0.9, 0.99, 1.0):
        assert sketch.quantile(q) == pytest.approx(values[int(q * 4999)], rel=0.0011)
    assert sketch.mean == pytest.approx(sum(values) / 5000)
    zeros = Quantiles()
    for value in (0.0, 0.0, 0.0, 2.0):
        zeros.add(value)
    assert zeros.quantile(0.5) == 0.0
    assert zeros.quantile(1.0) == pytest.approx(2.0, rel=0.0011)


def test_attainment_is_joint() -> None:
    summary = Summary(ttft_slo=7.0, tpot_slo=1.2)
    limits = Limits(100, max_num_seqs=4, max_num_batched_tokens=8)
    simulate([Job(0, 0.0, 4, 5), Job(1, 0.0, 20, 2)], SOURCE, limits, summary)
    # The first has 1.5 s a token, the second 7 s to its first and 1 s a token.
    assert (summary.attained, summary.attainment, summary.tokens) == (1, 0.5, 7)


@pytest.mark.parametrize(
    ("jobs", "text"),
    [
        ([Job(0, 0.0, 60, 6)], "request 0 needs 65 tokens of cache, engine 0 has 64"),
        ([Job(0, 2.0, 4, 1), Job(7, 1.0, 4, 1)], "request 7 arrives at 1 s, before request 0"),
    ],
)
def test_what_cannot_run_is_refused(jobs: list[Job], text: str) -> None:
    with pytest.raises(SimulationError, match=text):
        run(jobs, Limits(16, 4))


def test_settings_that_vllm_refuses() -> None:
    with pytest.raises(SimulationError, match="less than max_num_seqs"):
        Limits(10, max_num_seqs=20, max_num_batched_tokens=10)
    with pytest.raises(SimulationError, match="request 3: prompt 4"):
        Job(3, 0.0, 4, 1, cached=4)
