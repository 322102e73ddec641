"""The simulated length-aware order beside the plugin's, on vLLM's scheduler: how far the mean latency moves."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from replay_cases import make_policy
from replay_engine import EngineSettings, replay
from replay_harness import STEPS
from replay_workload import Room
from test_replay_order import rows

from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import FirstCome, Job, WaitingQueue
from vllm_suite.planner.simulator.order import LengthOrder
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, Uncertainty
from vllm_suite.planner.sources.steps import DecodeLine, Steps

# What is not simulated, off.
GROUPLESS = "groups.enabled=false"
ROOMY = f"victims.enabled=false,{GROUPLESS}"
PLAIN = f"headroom_tokens=0,{ROOMY}"
ORDERS: dict[str, tuple[str, Callable[[], WaitingQueue]]] = {
    "first come": ("fcfs", FirstCome),
    "kappa 0.02": (
        f"ours:rule=kappa,kappa=0.02,{PLAIN}",
        lambda: LengthOrder("kappa", kappa=0.02, headroom_tokens=0, victims=False),
    ),
    "kappa 0.1": (
        f"ours:rule=kappa,kappa=0.1,{PLAIN}",
        lambda: LengthOrder("kappa", kappa=0.1, headroom_tokens=0, victims=False),
    ),
    "boost": (f"ours:{PLAIN}", lambda: LengthOrder("boost", headroom_tokens=0, victims=False)),
    "kappa 0.1, headroom": (
        f"ours:rule=kappa,kappa=0.1,{ROOMY}",
        lambda: LengthOrder("kappa", kappa=0.1, victims=False),
    ),
    "boost, headroom": (f"ours:{ROOMY}", lambda: LengthOrder("boost", victims=False)),
    "kappa 0.1, victims": (
        f"ours:rule=kappa,kappa=0.1,headroom_tokens=0,{GROUPLESS}",
        lambda: LengthOrder("kappa", kappa=0.1, headroom_tokens=0),
    ),
    "boost, victims": (f"ours:headroom_tokens=0,{GROUPLESS}", lambda: LengthOrder("boost", headroom_tokens=0)),
    "boost, victims, headroom": (f"ours:{GROUPLESS}", lambda: LengthOrder("boost")),
}


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


@cache
def means(order: str) -> tuple[float, float, int, int]:
    """Mean latency on vLLM's scheduler and simulated, in overload and with a cache that is short; then preemptions."""
    policy, queue = ORDERS[order]
    work, room = rows(1.3), Room(blocks=400, seqs=16)
    settings, client = make_policy(policy, EngineSettings(room=room))
    real = replay(work, settings, STEPS, client)
    jobs = [Job(index, row.arrival_s or 0.0, row.prompt, row.output, label=row.label) for index, row in enumerate(work)]
    (engine,) = simulate(jobs, Affine(), Limits(399, max_num_seqs=16), lambda job, now: None, queue=queue).engines
    latency = statistics.fmean(job.last_token - job.arrival for job in jobs)
    return statistics.fmean(real.latency), latency, real.preemptions, engine.preemptions


SLOW = {"boost, victims"}


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=pytest.mark.slow) if order in SLOW else order for order in list(ORDERS)[1:]]
)
def test_the_mean_moves_as_on_vllms_scheduler(order: str) -> None:
    (real, simulated, evicted, gave_way), (first_real, first_simulated, *_) = means(order), means("first come")
    assert first_simulated == pytest.approx(first_real, rel=1e-9)
    print(
        f"{order}: {real / first_real - 1:+.1%} on vLLM's scheduler, {simulated / first_simulated - 1:+.1%} simulated;"
        f" preemptions {evicted}, {gave_way}"
    )
    assert simulated / first_simulated == pytest.approx(real / first_real, abs=0.04)
    assert simulated < 0.85 * first_simulated
    assert gave_way == pytest.approx(evicted, rel=0.1)
