"""The planner's simulated engine against vLLM's own scheduler, request by request, on the same step times."""

from __future__ import annotations

import random

import numpy as np
import pytest
from replay_engine import EngineSettings, replay
from replay_steps import AffineSteps
from replay_traces import Row
from replay_workload import Room

from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, Uncertainty
from vllm_suite.planner.sources.steps import DecodeLine, Steps

# Powers of two, and arrivals that are multiples of one: sums are exact, and so are ties.
STEPS = AffineSteps(step=2.0**-7, per_sequence=2.0**-16, per_kv_token=2.0**-26, per_prefill_token=2.0**-16)


class Affine(LatencySource):
    """The replay's step times for the simulator."""

    name, uncertainty, outside = "affine", Uncertainty(0.0, "by definition"), Outside("refuse")

    def step_seconds(self, steps: Steps) -> float:
        return float(STEPS.step_seconds(steps))

    def seconds(self, steps: Steps) -> FloatArray:
        return np.array(self.step_seconds(steps))

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        first = self.step_seconds(Steps(decode_sequences=sequences, decode_context=context))
        return DecodeLine(first, STEPS.per_kv_token * sequences)


CASES = {
    # blocks, sequences, budget, requests, mean gap in units of 1/1024 s
    "seats": (2000, 4, 512, 60, 300),
    "chunks": (2000, 32, 128, 60, 150),
    "cache": (150, 32, 512, 60, 100),
    "cache and chunks": (120, 16, 64, 60, 300),
    "idle": (2000, 8, 8192, 40, 3000),
}


@pytest.mark.parametrize("case", CASES)
def test_every_request_gets_its_tokens_when_vllms_scheduler_gives_them(case: str) -> None:
    blocks, seqs, budget, count, gap = CASES[case]
    draw, at, rows = random.Random(case), 0.0, []
    for _ in range(count):
        at += draw.randrange(2 * gap) / 1024
        rows.append(Row(at, draw.randrange(1, 900), draw.randrange(1, 300)))
    outcome = replay(rows, EngineSettings(room=Room(blocks=blocks, seqs=seqs), batched_tokens=budget), STEPS)
    jobs = [Job(index, row.arrival_s or 0.0, row.prompt, row.output) for index, row in enumerate(rows)]
    # vLLM keeps one block for itself.
    limits = Limits(blocks - 1, max_num_seqs=seqs, max_num_batched_tokens=budget)
    (engine,) = simulate(jobs, Affine(), limits, lambda job, now: None).engines
    assert [job.ttft for job in jobs] == outcome.first_token
    assert [job.last_token - job.arrival for job in jobs] == outcome.latency
    assert (engine.steps, engine.preemptions) == (outcome.steps, outcome.preemptions)
    assert (engine.preemptions > 0) == case.startswith("cache")
