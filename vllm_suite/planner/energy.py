"""Electrical energy of a run: what each step computes and moves, between an accelerator's idle and its full power.

An accelerator draws ``idle + (tdp - idle) * min(1, c * compute + m * memory)``, where `compute` and `memory` are the
shares of its peak operations and of its peak bandwidth that a step uses. The two constants are round figures for what
is widely reported of these cards: large products draw full power, decoding between half and two thirds of it. Nothing
here was compared with a meter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_suite.planner.models import Model, Quantization
from vllm_suite.planner.models.memory import kv_bytes_per_token, weight_bytes
from vllm_suite.planner.models.operations import operations, operators
from vllm_suite.planner.models.sharding import Parallel
from vllm_suite.planner.observing import PoolOf
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.simulator.engine import Engine
from vllm_suite.planner.simulator.fleet import FleetRun
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.steps import DecodeLine, Steps

COMPUTE = 1 / 0.75
"""Full power where three quarters of the peak operations are reached, as large products do."""

MEMORY = 0.6 / 0.9
"""Six tenths of it where nine tenths of the bandwidth are."""

Floats = np.ndarray[Any, np.dtype[np.float64]]
_BLOCK = 4096


@dataclass(frozen=True)
class Load:
    """What one engine's accelerators do in a step, summed over all of them, in seconds at their peaks.

    Attributes:
        gpus: of the engine.
        token, sampled, pair, key: seconds of peak operations; see `models.operations`.
        weights: seconds of peak bandwidth for every weight that each step reads.
        experts: the same for all experts, and the share of them that one token reads.
        cached: for a token's cache.
    """

    gpus: int
    token: float
    sampled: float
    pair: float
    key: float
    weights: float
    experts: float
    used: float
    cached: float

    @classmethod
    def of(cls, model: Model, quant: Quantization, parallel: Parallel, setting: Setting) -> Load:
        """Of an engine."""
        device, ranks = setting.cluster.device, parallel.tp * parallel.dp
        base = device.flops(quant.base)
        token = sampled = pair = key = weights = experts = cached = 0.0
        used = 1.0
        for stage in range(parallel.pp):
            work = operations(model, parallel, stage)
            pair, key = pair + work.per_pair / base, key + work.per_key / base
            tokens = samples = 0.0
            for product, layers in operators(model, parallel, stage):
                linear = product.linear
                rows = 1.0
                if linear.experts > 1:
                    rows = parallel.dp * linear.used * product.experts / linear.experts
                    used = linear.used / linear.experts
                    experts += layers * quant.linear_bytes(linear, product.weights, product.biases)
                flops = 2.0 * rows * product.inputs * product.outputs * layers
                slower = base / device.flops(quant.compute(linear))
                if linear.rows == "tokens":
                    token, tokens = token + flops * slower / base, tokens + flops
                else:
                    sampled, samples = sampled + flops * slower / base, samples + flops
            # The output head, which is no layer's.
            sampled += (work.per_sampled - samples) / base
            weights += weight_bytes(model, quant, parallel, stage)
            cached += kv_bytes_per_token(model, quant, parallel, stage)
        # The embedding is looked up, not read; a tied one is the output head too.
        lookup = 0.0 if model.tied and parallel.pp == 1 else model.vocab * model.hidden * quant.base_bytes / parallel.tp
        peaks = ranks / device.bandwidth
        return cls(
            parallel.gpus, ranks * token, ranks * sampled, ranks * pair, ranks * key,
            peaks * max(0.0, weights - experts - lookup), peaks * experts, used, peaks * cached,
        )  # fmt: skip

    def joules(self, seconds: Any, count: Any, steps: Steps, span: float) -> Any:
        """Above idle.

        Args:
            seconds: of all `count` steps together, which are alike.
            count: steps.
            steps: one of them; its fields may be arrays.
            span: watts between idle and full power.
        """
        tokens = steps.prefill_tokens + steps.decode_sequences
        sequences = steps.prefill_chunks + steps.decode_sequences
        compute = self.token * tokens + self.sampled * sequences
        compute = compute + self.pair * steps.prefill_pairs + self.key * steps.decode_context
        met = 1.0 - (1.0 - self.used) ** tokens
        memory = self.weights + self.experts * met + self.cached * (steps.prefill_context + steps.decode_context)
        busy = count * (COMPUTE * compute + MEMORY * memory)
        return span * np.minimum(busy, self.gpus * np.asarray(seconds, dtype=float))


class Meter:
    """An observer that adds up what engines draw above idle. Encoders are not observed; see `joules`."""

    def __init__(self, plan: Plan, setting: Setting) -> None:
        power = setting.cluster.device.power
        self.setting, self.span = setting, power.tdp_w - power.idle_w
        self._plan, self._pool = plan, PoolOf(plan)
        self._loads: dict[PoolPlan, Load] = {}
        self._rows: dict[PoolPlan, list[tuple[float, ...]]] = {}
        self._joules = 0.0

    def __call__(
        self, engine: Engine, start: float, end: float, count: int, steps: Steps, line: DecodeLine | None
    ) -> None:
        """See `engine.Observer`."""
        rows = self._rows.setdefault(self._pool(engine), [])
        rows.append((end - start, count, *steps))
        if len(rows) == _BLOCK:
            self._flush()

    def _flush(self) -> None:
        for pool, rows in self._rows.items():
            if not rows:
                continue
            table = np.array(rows).T
            seconds, count, fields = table[0], table[1], list(table[2:])
            # Contexts grow by a token a step, so those of the middle step are the mean.
            fields[5] = fields[5] + fields[4] * (count - 1) / 2
            self._joules += float(self._load(pool).joules(seconds, count, Steps(*fields), self.span).sum())
            rows.clear()

    def _load(self, pool: PoolPlan) -> Load:
        if pool not in self._loads:
            quant, model = pool.quant or self.setting.quant, self.setting.held(pool, encoder=False)
            self._loads[pool] = Load.of(model, quant, pool.parallel, self.setting)
        return self._loads[pool]

    def joules(self, run: FleetRun) -> float:
        """Above idle, of the whole run; encoders at full power while they are at work."""
        self._flush()
        encode, pool = run.pools.get("encode"), self._plan.pool("encode")
        extra = self.span * sum(encode.busy) * pool.parallel.gpus if encode is not None and pool is not None else 0.0
        return self._joules + extra
