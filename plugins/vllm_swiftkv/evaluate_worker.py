"""One engine run of an evaluation, in a process of its own: ``python -m vllm_swiftkv.evaluate_worker SPEC OUT``.

A process per engine gives all its memory back before the next one starts. The engine is vLLM as lm-evaluation-harness
drives it; what is ours is the skip, armed or not through the plugin's own settings, and the counters.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_swiftkv.evaluate_tasks import Request, Tasks, load
from vllm_swiftkv.families import SwiftKVError

SKIPPED = "tail_rows_skipped"
_RPC_S = 120.0


class RunSpec(BaseModel):
    """What one engine runs.

    Attributes:
        skip: whether prompt tokens skip the later layers; None for a model that is not SwiftKV's.
        engine: further arguments of `vllm.LLM`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    skip: bool | None
    requests: tuple[Request, ...]
    include_path: str | None = None
    limit: float | None = None
    seed: int = 1234
    engine: dict[str, Any] = {}


def environment(skip: bool | None) -> dict[str, str | None]:
    """Variables of the process that runs the engine; None removes one."""
    plugins = None if skip is None else "swiftkv"
    return {"VLLM_SUITE_PLUGINS": plugins, "VLLM_SUITE_ROLE": None, "VLLM_SUITE_REFUSED_OPTIONS": None}


def engine_arguments(spec: RunSpec) -> dict[str, Any]:
    """Arguments for the harness's vLLM model class."""
    arguments = {"disable_log_stats": True, **spec.engine, "pretrained": spec.model, "seed": spec.seed}
    if spec.skip is not None:
        additional = dict(arguments.get("additional_config") or {})
        suite = dict(additional.get("suite") or {})
        suite["swiftkv"] = {**(suite.get("swiftkv") or {}), "skip": spec.skip}
        arguments |= {
            "additional_config": {**additional, "suite": suite},
            "worker_extension_cls": "vllm_swiftkv.worker.SwiftKVWorkerExtension",
        }
    return arguments


def evaluate(spec: RunSpec) -> dict[str, Any]:
    """Run the harness. Returns its results and the growth of the counters for each request."""
    from lm_eval.evaluator import simple_evaluate

    names = [request.name for request in spec.requests]
    manager = Tasks(spec.include_path, names).manager
    for name in names:  # before the engine: a missing dataset costs seconds here
        load(manager, name)
    from lm_eval.models.vllm_causallms import VLLM

    begun = time.monotonic()
    lm = VLLM(**engine_arguments(spec))
    armed = bool(lm.model.llm_engine.vllm_config.cache_config.kv_sharing_fast_prefill)
    if armed != bool(spec.skip):
        raise RuntimeError(f"the engine's skip is {'on' if armed else 'off'}, against what was asked for")
    started = time.monotonic()
    runs: dict[str, Any] = {}
    for request in spec.requests:
        before = _counters(lm, spec.skip)
        results = simple_evaluate(
            model=lm,
            tasks=[request.name],
            task_manager=manager,
            num_fewshot=request.num_fewshot,
            apply_chat_template=request.chat,
            fewshot_as_multiturn=request.multiturn,
            gen_kwargs={"max_gen_toks": request.max_gen_toks} if request.max_gen_toks else None,
            limit=spec.limit,
            random_seed=spec.seed,
            numpy_random_seed=spec.seed,
            torch_random_seed=spec.seed,
            fewshot_random_seed=spec.seed,
        )
        runs[request.name] = {"results": results, "counters": _growth(before, _counters(lm, spec.skip))}
    return {
        "skip": armed if spec.skip is not None else None,
        "start_s": round(started - begun, 2),
        "run_s": round(time.monotonic() - started, 2),
        "requests": runs,
    }


def _counters(lm: Any, skip: bool | None) -> dict[str, int]:
    """Of one worker; those of a tensor-parallel group count the same."""
    if skip is None:
        return {}
    counted: dict[str, int] = lm.model.collective_rpc("swiftkv_counters", timeout=_RPC_S)[0]
    return counted


def _growth(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    grown = {name: after[name] - before[name] for name in after}
    return grown | {SKIPPED: grown["head_tokens"] - grown["tail_rows"]} if grown else {}


def _plain(value: Any) -> Any:
    """NumPy's scalars as numbers, everything else that JSON does not know as text."""
    return value.item() if getattr(value, "shape", None) == () else str(value)


def main(argv: list[str]) -> int:
    """Status 0 with results in OUT, or 2 (what was asked cannot be done) or 1 with the reason there."""
    spec = RunSpec.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
    for name, value in environment(spec.skip).items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    status, found = 0, {}
    try:
        found = evaluate(spec)
    except SwiftKVError as error:
        status, found = 2, {"error": str(error)}
    except Exception as error:  # noqa: BLE001  the parent reports it
        import traceback

        traceback.print_exc()
        status, found = 1, {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    Path(argv[1]).write_text(json.dumps(found, default=_plain), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
