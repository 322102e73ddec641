"""Predictions for `planner_cpu.py`: the calibrated source in the planner's simulators, per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_suite.planner.calibrate.file import Calibration
from vllm_suite.planner.calibrate.file import Serving as Constants
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.hardware.device import Cluster, Link
from vllm_suite.planner.models import Parallel, Quantization, load
from vllm_suite.planner.models.memory import kv_bytes
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.base import Outside
from vllm_suite.planner.sources.calibrated import CalibratedSource
from vllm_suite.planner.workload import Request

_ROUNDS = 4


@dataclass(frozen=True)
class Times:
    """Of every request, in order of their numbers, in seconds."""

    ttft: np.ndarray[Any, np.dtype[np.float64]]
    tpot: np.ndarray[Any, np.dtype[np.float64]]
    busy: tuple[float, ...] = ()
    outside: tuple[dict[str, Any], ...] = ()

    def figures(self, slo: tuple[float, float]) -> dict[str, float]:
        """What is compared; `slo` is of TTFT and TPOT."""
        latency = {}
        for name, values in (("ttft", self.ttft), ("tpot", self.tpot)):
            latency[f"{name}_mean"] = float(values.mean())
            latency[f"{name}_p50"] = float(np.quantile(values, 0.5))
            latency[f"{name}_p99"] = float(np.quantile(values, 0.99))
        met = (self.ttft <= slo[0]) & (self.tpot <= slo[1])
        return {**latency, "attainment": float(met.mean())}


class LeastTokens:
    """The router's default: fewest outstanding tokens, as it counts them; equal engines take turns."""

    def __init__(self, most: int) -> None:
        self._most, self._turn = most, 0
        self._held: dict[int, tuple[int, int]] = {}
        self._load: dict[int, int] = {}

    def __call__(self, engines: Sequence[Engine], job: Job, now: float) -> Engine:
        self._turn += 1
        count = len(engines)
        index = min(range(count), key=lambda i: (self._load.get(i, 0), (i - self._turn) % count))
        demand = job.prompt + self._most
        self._held[job.number] = (index, demand)
        self._load[index] = self._load.get(index, 0) + demand
        return engines[index]

    def ended(self, number: int) -> None:
        """The answer is out."""
        index, demand = self._held.pop(number)
        self._load[index] -= demand


def in_company(arrival: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Of each request whether another one is in the fleet when it comes or when its first token does."""
    found = np.zeros(len(arrival), dtype=bool)
    for moment in (arrival, first):
        inside = (arrival[None, :] <= moment[:, None]) & (moment[:, None] < last[None, :])
        np.fill_diagonal(inside, False)
        found |= inside.any(axis=1)
    return found


def beyond_steps(
    request_s: float, served: Constants, prompt: np.ndarray, arrival: np.ndarray, ttft: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """Simulated seconds to the first token with what the steps do not know of.

    Args:
        request_s: of an idle fleet.
        served: for what comes on top of it in company.
        prompt, arrival, ttft, last: of each request: tokens, seconds of its coming, to its first token, of its last.
    """
    company = in_company(arrival, arrival + ttft, last)
    return np.asarray(ttft + request_s + served.prompt_token_s * prompt + served.busy_s * company)


def colocated(calibration: Calibration, requests: Sequence[Request], most: int) -> Times:
    """Two engines behind the router. What each does to the other follows from how busy both are."""
    facts, served = calibration.facts, calibration.serving["colocated"]
    limits = Limits(
        blocks=facts["blocks"] - 1,
        block_size=facts["block_size"],
        max_num_seqs=facts["max_num_seqs"],
        max_num_batched_tokens=facts["max_num_batched_tokens"],
    )
    share, found = 0.5, Times(np.zeros(0), np.zeros(0))
    for _ in range(_ROUNDS):
        source = CalibratedSource(calibration, neighbours=share, serving="colocated", outside=Outside("clamp"))
        route, done = LeastTokens(most), {}

        def finished(job: Job, now: float, route: LeastTokens = route, done: dict[int, Job] = done) -> None:
            route.ended(job.number)
            done[job.number] = job

        jobs = (Job(each.number, each.arrival, each.prompt, each.output) for each in requests)
        pool = simulate(jobs, source, limits, finished, engines=2, route=route)
        end = max(job.last_token for job in done.values())
        busy = tuple(engine.busy / end for engine in pool.engines)
        share = sum(busy) / len(busy)
        rows = [done[each.number] for each in requests]
        prompt, arrival, ttft, last = np.array([(job.prompt, job.arrival, job.ttft, job.last_token) for job in rows]).T
        ttft = beyond_steps(served.request_s, served, prompt, arrival, ttft, last)
        found = Times(ttft, np.array([job.tpot for job in rows]), busy, (dict(source.outside.report()),))
    return found


def disaggregated(calibration: Calibration, requests: Sequence[Request], model: Path) -> Times:
    """One engine that prefills, one that decodes. Router and client take their time from the prefill engine's core."""
    facts, plain, handed = calibration.facts, calibration.serving["colocated"], calibration.serving["disaggregated"]
    settings = {
        "kv_blocks": facts["blocks"] - 1,
        "max_num_seqs": facts["max_num_seqs"],
        "max_num_batched_tokens": facts["max_num_batched_tokens"],
    }
    plan = Plan((PoolPlan("prefill", 1, **settings), PoolPlan("decode", 1, **settings))).placed()
    shape, stored = load(model)
    quant = stored or Quantization()
    per_token = kv_bytes(shape, quant, Parallel(), 128, stage=0, block=128) / 128
    handover_s = max(0.0, handed.request_s - plain.request_s)
    # The pull runs beside the decode engine's steps, the rest comes before it is asked.
    latency_s = min(handover_s, handed.pull_s or 0.0)
    token_s = max(1e-9, handed.prompt_token_s - plain.prompt_token_s)
    busy, found = {"prefill": 0.5, "decode": 0.5}, Times(np.zeros(0), np.zeros(0))
    for _ in range(_ROUNDS):
        span = requests[-1].arrival or 1.0
        slowdown = 1 / (1 - min(0.5, handed.shared_token_s * sum(each.output for each in requests) / span))
        sources = {
            "prefill": CalibratedSource(
                calibration,
                neighbours=busy["decode"],
                serving="colocated",
                prompt_s=handed.prompt_cpu_s,
                slowdown=slowdown,
                outside=Outside("clamp"),
            ),
            "decode": CalibratedSource(
                calibration,
                neighbours=busy["prefill"],
                serving="disaggregated",
                prompt_s=handed.answer_cpu_s,
                outside=Outside("clamp"),
            ),
        }
        setting = Setting(
            model=shape,
            quant=quant,
            cluster=_linked(per_token / token_s, latency_s),
            source=lambda pool, sources=sources: sources[pool.role],
            async_scheduling=False,
            block_size=facts["block_size"],
            serving=Serving(min_prompt_tokens=0, hop_s=handover_s - latency_s),
        )
        done: dict[int, Served] = {}
        run = simulate_plan(plan, setting, requests, lambda each, done=done: done.update({each.number: each}))
        busy = {role: run.pools[role].busy[0] / run.end for role in ("prefill", "decode")}
        rows = [done[each.number] for each in requests]
        prompt, arrival, ttft, last = np.array(
            [(each.prompt, each.arrival, each.ttft, each.arrival + each.latency) for each in rows]
        ).T
        # The hand-over is simulated; what a prompt's length costs beyond it is that of one pool.
        constants = handed.model_copy(update={"prompt_token_s": plain.prompt_token_s})
        ttft = beyond_steps(min(plain.request_s, handed.request_s), constants, prompt, arrival, ttft, last)
        beyond = tuple(dict(sources[role].outside.report()) for role in ("prefill", "decode"))
        found = Times(ttft, np.array([each.tpot for each in rows]), (busy["prefill"], busy["decode"]), beyond)
    return found


def _linked(bytes_per_s: float, latency_s: float) -> Cluster:
    """The two cores with the hand-over as it was measured between them."""
    machine = cluster("2xCPU-2CORE")
    link = Link(gb_s=bytes_per_s / 1e9, latency_us=latency_s * 1e6)
    node = machine.device.node.model_copy(update={"gpus": 2, "pcie": link, "nvlink": None})
    return machine.model_copy(update={"device": machine.device.model_copy(update={"node": node})})
