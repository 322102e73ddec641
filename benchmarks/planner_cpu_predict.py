"""Predictions for `planner_cpu.py`: the calibrated source in the planner's simulator, per request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_suite.planner.calibrate.file import Calibration
from vllm_suite.planner.calibrate.served import Constants
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Quantization, load
from vllm_suite.planner.plan import Plan, PoolPlan, Role
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.base import Outside
from vllm_suite.planner.sources.calibrated import CalibratedSource
from vllm_suite.planner.workload import Request


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


def colocated(calibration: Calibration, requests: Sequence[Request], most: int, model: Path) -> Times:
    """Two engines behind the router, which is told that every answer has `most` tokens."""
    return _predicted(calibration, requests, model, {"any": 2}, most)


def disaggregated(calibration: Calibration, requests: Sequence[Request], model: Path) -> Times:
    """One engine that prefills, one that decodes."""
    return _predicted(calibration, requests, model, {"prefill": 1, "decode": 1})


def _predicted(
    calibration: Calibration,
    requests: Sequence[Request],
    model: Path,
    engines: dict[Role, int],
    most: int | None = None,
) -> Times:
    facts = calibration.facts
    plan = Plan(
        tuple(
            PoolPlan(
                role,
                count,
                kv_blocks=facts["blocks"] - 1,
                max_num_seqs=facts["max_num_seqs"],
                max_num_batched_tokens=facts["max_num_batched_tokens"],
            )
            for role, count in engines.items()
        )
    ).placed()
    shape, stored = load(str(model))
    sources = {role: CalibratedSource(calibration, outside=Outside("clamp")) for role in engines}
    setting = Setting(
        model=shape,
        quant=stored or Quantization(),
        cluster=cluster("2xCPU-2CORE"),
        source=lambda pool: sources[pool.role],
        async_scheduling=False,
        block_size=facts["block_size"],
        serving=Serving(min_prompt_tokens=0, answer_tokens=most),
    )
    setting = Constants(calibration).settled(plan, setting, lambda: requests, close=-1.0)
    done: dict[int, Served] = {}
    run = simulate_plan(plan, setting, requests, lambda each: done.update({each.number: each}))
    rows = [done[each.number] for each in requests]
    return Times(
        np.array([each.ttft for each in rows]),
        np.array([each.tpot for each in rows]),
        tuple(busy / run.end for role in engines for busy in run.pools[role].busy),
        tuple(dict(source.outside.report()) for source in sources.values()),
    )
