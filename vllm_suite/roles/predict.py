"""Goodput of a fleet by its numbers of engines, from the planner's step times: cheap enough for every look.

Nothing is simulated: `vllm_suite.planner.search.bounds` estimates a plan from the times of steps alone, with M/D/1
waiting before prefill and decode batches within the target (DistServe, arXiv 2401.09670, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vllm_suite.roles.traffic import Traffic

if TYPE_CHECKING:
    from vllm_suite.fleet.engine import EngineSpec
    from vllm_suite.fleet.spec import FleetSpec
    from vllm_suite.planner.models import Model, Parallel, Quantization
    from vllm_suite.planner.plan import PoolPlan, Role
    from vllm_suite.planner.search.bounds import Bounds
    from vllm_suite.roles.config import PredictSpec

SWITCH_S = 1.0
"""Of a switch beside draining: closing the door, probes, opening."""

_KEPT = 64


class PredictError(ValueError):
    """The fleet file cannot be predicted; the text says which key and what to do."""


class Predictor:
    """One fleet's engines.

    Reads the model's config and builds the source of step times once. Raises PredictError.
    """

    def __init__(self, fleet: FleetSpec) -> None:
        from vllm_suite.planner.hardware import HardwareError, cluster
        from vllm_suite.planner.models import ModelError, Parallel, load
        from vllm_suite.planner.plan import PlanError, Slo
        from vllm_suite.planner.search.sources import Sources, measured, source_maker
        from vllm_suite.planner.simulator.setting import Serving, Setting
        from vllm_suite.planner.sources.base import SourceError

        wanted = fleet.roles.predict
        if wanted is None:
            raise PredictError("roles.predict: rule goodput needs it; say at least which hardware the engines run on")
        pool = fleet.pools.any
        if pool is None:
            raise PredictError("pools.any: no instance of the fleet can change its role")
        engine = fleet.engine.overridden_by(pool.engine)
        self._spec: PredictSpec = wanted
        try:
            model, quant = load(fleet.model)
            hardware = cluster(wanted.hardware)
            make = source_maker(wanted.source, hardware)
            facts = measured(wanted.source, fleet.model, model.name)
            parallel = Parallel(
                tp=engine.tensor_parallel_size or 1,
                pp=engine.pipeline_parallel_size or 1,
                dp=engine.data_parallel_size or 1,
            )
            self._pools = {
                role: _pool(role, fleet, engine, parallel, model, quant, facts) for role in ("prefill", "decode")
            }  # type: dict[Role, PoolPlan]
            self._setting = Setting(
                model,
                quant,
                hardware,
                Sources(make, model, quant, hardware),
                async_scheduling=bool(facts.get("async_scheduling", engine.async_scheduling is not False)),
                block_size=int(facts.get("block_size") or engine.block_size or 16),
                serving=Serving(min_prompt_tokens=fleet.router.disaggregation.min_prompt_tokens),
                utilisation=engine.gpu_memory_utilization or 0.9,
            )
            share = fleet.slo.attainment if wanted.attainment is None else wanted.attainment
            self._slo = Slo(_seconds(fleet.slo.ttft), _seconds(fleet.slo.tpot), share)
            self._free = Slo(attainment=share)
            for each in self._pools.values():
                self._setting.source(each)
                self._setting.limits(each)
        except (HardwareError, ModelError, PlanError, SourceError, OSError) as error:
            raise PredictError(f"roles.predict: {error}") from error
        self._bounds: dict[tuple[int, int, bool], Bounds] = {}

    def goodput(self, traffic: Traffic, counts: Mapping[Role, int]) -> float:
        """Requests per second within the targets, no more than come; 0 where a stage has no engine.

        Where the targets cannot be met by an idle fleet, what is counted is requests, in time or not.
        """
        from dataclasses import replace

        from vllm_suite.planner.plan import Plan

        if any(counts.get(role, 0) < 1 for role in self._pools):
            return 0.0
        plan = Plan(tuple(replace(pool, count=counts[role]) for role, pool in self._pools.items()))
        found = self._bound(traffic, within=True).plan(plan)
        if found.attainment < self._slo.attainment:
            found = self._bound(traffic, within=False).plan(plan)
        return min(traffic.demand(self._spec.window), found.estimate)

    def switch_seconds(self, traffic: Traffic, source: Role, engines: int) -> float:
        """Of a switch away from `source`: until what runs on one of its engines has ended, and the rest of it."""
        from vllm_suite.planner.sources.steps import Steps

        bounds, pool = self._bound(traffic, within=False), self._pools[source]
        if source == "prefill":
            return SWITCH_S + float(bounds.engine(pool).first.max())
        batch = max(1, min(pool.max_num_seqs, math.ceil(traffic.running / max(1, engines))))
        context = batch * (traffic.prompt + traffic.output / 2)
        step = self._setting.source(pool).step_seconds(Steps(decode_sequences=batch, decode_context=context))
        return SWITCH_S + traffic.output * step

    def _bound(self, traffic: Traffic, within: bool) -> Bounds:
        from vllm_suite.planner.search.bounds import Bounds
        from vllm_suite.planner.workload import Request

        # Lengths to 5 %: what was worked out for them serves many looks.
        prompt, output = _rounded(traffic.prompt), _rounded(traffic.output)
        key = (prompt, output, within)
        if key not in self._bounds:
            if len(self._bounds) >= _KEPT:
                self._bounds.clear()
            self._bounds[key] = Bounds(
                self._setting, [Request(0, 0.0, prompt, output)], self._slo if within else self._free
            )
        return self._bounds[key]


def _pool(
    role: Role,
    fleet: FleetSpec,
    engine: EngineSpec,
    parallel: Parallel,
    model: Model,
    quant: Quantization,
    facts: Mapping[str, int],
) -> PoolPlan:
    from vllm_suite.planner.models.memory import kv_bytes_per_token
    from vllm_suite.planner.plan import PoolPlan

    limits = fleet.roles.limits.of(role)
    usual = PoolPlan(role, 1)
    seqs = limits.get("max_num_seqs") or engine.max_num_seqs or facts.get("max_num_seqs") or usual.max_num_seqs
    tokens = (
        limits.get("max_num_batched_tokens")
        or engine.max_num_batched_tokens
        or facts.get("max_num_batched_tokens")
        or usual.max_num_batched_tokens
    )
    blocks = facts.get("blocks")
    if engine.kv_cache_memory_bytes:
        block = engine.block_size or facts.get("block_size") or 16
        blocks = int(engine.kv_cache_memory_bytes // (block * kv_bytes_per_token(model, quant, parallel)))
    return PoolPlan(
        role, 1, parallel, max_num_seqs=int(seqs), max_num_batched_tokens=max(int(seqs), int(tokens)), kv_blocks=blocks
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _rounded(tokens: float) -> int:
    return max(1, round(1.05 ** round(math.log(max(1.0, tokens), 1.05))))
