"""A plan as a fleet file that `vllm-suite up` takes as it is."""

from __future__ import annotations

from typing import Any

from vllm_suite.fleet.files import dump_fleet
from vllm_suite.fleet.predicted import PredictedSpec
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.planner.models import Model, Quantization
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Slo
from vllm_suite.planner.simulator.setting import Setting

# vLLM quantises a 16-bit checkpoint to these while it loads; any other format has to be the checkpoint's.
_ON_LOADING = {"fp8": "fp8"}


def fleet_of(
    plan: Plan,
    setting: Setting,
    slo: Slo,
    *,
    model: str,
    longest: int | None = None,
    name: str = "planned",
    length_aware: bool = False,
    predicted: PredictedSpec | None = None,
) -> FleetSpec:
    """The fleet of a plan.

    Args:
        setting: which the plan was simulated with.
        model: checkpoint folder or hub name.
        longest: ``max_model_len``; None leaves it to the model.
        length_aware: plugin `dler`, whose order of waiting requests was simulated.
        predicted: what requests will see, see `vllm_suite.planner.report.predicted`.

    Raises:
        PlanError: formats that vLLM cannot make of the checkpoint.
    """
    swiftkv = any(layer.late for layer in setting.model.layers)
    encodes = plan.pool("encode") is not None
    plugins = ["disagg", *(["epd"] if encodes else []), *(["swiftkv"] if swiftkv else [])]
    plugins += ["dler"] if length_aware else []
    engine: dict[str, Any] = {
        "gpu_memory_utilization": setting.utilisation,
        "block_size": setting.block_size,
        "enable_prefix_caching": setting.prefix_caching,
        "async_scheduling": all(setting.ahead(pool) for pool in plan.pools),
    }
    if longest is not None:
        engine["max_model_len"] = longest
    data: dict[str, Any] = {
        "name": name,
        "model": model,
        "plugins": plugins,
        "engine": engine,
        "pools": {pool.role: _pool(pool, setting.model, setting.quant) for pool in plan.pools},
        "slo": {key: value for key, value in (("ttft", _ms(slo.ttft)), ("tpot", _ms(slo.tpot))) if value}
        | {"attainment": slo.attainment},
    }
    if plan.pool("prefill") is not None:
        data["router"] = {"disaggregation": {"min_prompt_tokens": setting.serving.min_prompt_tokens}}
    if predicted is not None:
        data["predicted"] = predicted
    data["kubernetes"] = _kubernetes(plan, setting)
    return FleetSpec.model_validate(data)


def _kubernetes(plan: Plan, setting: Setting) -> dict[str, Any]:
    """Nodes as they were simulated. A plan within one node moved its KV blocks over the links inside: keep it there."""
    node = setting.cluster.device.node.gpus
    found: dict[str, Any] = {"gpus_per_node": node}
    first = [rank for pool in plan.placed().pools for rank in pool.ranks or ()]
    if len(first) > 1 and max(first) < node and plan.gpus <= node:
        found["placement"] = {"same_domain": "kubernetes.io/hostname"}
    return found


def fleet_text(spec: FleetSpec, head: list[str]) -> str:
    """The file, with lines of comment at its head."""
    return "".join(f"# {line}\n" for line in head) + dump_fleet(spec)


def _pool(pool: PoolPlan, model: Model, stored: Quantization) -> dict[str, Any]:
    cut = pool.parallel
    if pool.role == "decode" and cut.pp > 1:
        raise PlanError(
            f"pool {pool.name}: vLLM's NIXL connector takes no pipeline stages on decode; give --space pp=1"
        )
    engine: dict[str, Any] = {}
    for key, size in (("tensor", cut.tp), ("pipeline", cut.pp), ("data", cut.dp)):
        if size > 1:
            engine[f"{key}_parallel_size"] = size
    if pool.role != "encode":
        engine["max_num_seqs"] = pool.max_num_seqs
        engine["max_num_batched_tokens"] = pool.max_num_batched_tokens
    engine |= _formats(pool, stored)
    if cut.ep:
        engine["args"] = ["--enable-expert-parallel"]
    if pool.kv_blocks is not None:
        engine["args"] = [*engine.get("args", []), "--num-gpu-blocks-override", str(pool.kv_blocks)]
    if cut.encoder_data:
        engine["args"] = [*engine.get("args", []), "--mm-encoder-tp-mode", "data"]
    if pool.late_kv_only:
        engine["additional_config"] = {"suite": {"swiftkv": {"prefill_only": True}}}
    return {"replicas": pool.count, "engine": engine}


def _formats(pool: PoolPlan, stored: Quantization) -> dict[str, Any]:
    own = pool.quant
    if own is None or own == stored:
        return {}
    found: dict[str, Any] = {}
    if own.weights != stored.weights:
        if own.weights not in _ON_LOADING or stored.weights not in ("bf16", "fp16", "fp32"):
            raise PlanError(f"pool {pool.name}: vLLM cannot make {own.weights} of a checkpoint in {stored.weights}; "
                            f"name a checkpoint that is stored so")  # fmt: skip
        found["quantization"] = _ON_LOADING[own.weights]
    if own.kv != stored.kv:
        found["kv_cache_dtype"] = own.kv
    return found


def _ms(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1000:g}ms"
