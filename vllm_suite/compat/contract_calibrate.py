"""Rows for `step_timing`, which times an engine's steps."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_ENGINE = "vllm.v1.engine.llm_engine:LLMEngine"
_LOGGER = "vllm.v1.metrics.loggers:StatLoggerBase"
_DETAILS = "vllm.v1.metrics.stats:SchedulerIterationDetails"

ROWS: tuple[Contract, ...] = (
    Contract("vllm.engine.arg_utils:EngineArgs", "class", "what the measured engine is built from"),
    Contract("vllm.engine.arg_utils:EngineArgs.enable_prefix_caching", "attribute", "contexts come from the cache"),
    Contract("vllm.engine.arg_utils:EngineArgs.enable_logging_iteration_details", "attribute", "what a step held"),
    Contract(_ENGINE, "class", "adds requests, steps, aborts"),
    Contract(
        f"{_ENGINE}.from_engine_args",
        "classmethod",
        "the engine in this process",
        ("cls", "engine_args", "usage_context", "stat_loggers", "enable_multiprocessing"),
    ),
    Contract(
        f"{_ENGINE}.add_request", "method", "puts a sequence into the batch", ("self", "request_id", "prompt"), True
    ),
    Contract(f"{_ENGINE}.step", "method", "the step that is timed", ("self",)),
    Contract(f"{_ENGINE}.abort_request", "method", "ends a batch", ("self", "request_ids"), True),
    Contract(f"{_ENGINE}.has_unfinished_requests", "method", "whether the engine is idle", ("self",)),
    Contract("vllm.sampling_params:SamplingParams", "class", "greedy, to a length"),
    Contract("vllm.sampling_params:RequestOutputKind.CUMULATIVE", "attribute", "tokens so far with each step"),
    Contract(_LOGGER, "class", "base of the logger that keeps the details"),
    Contract(
        f"{_LOGGER}.record",
        "method",
        "overridden",
        ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
    ),
    Contract("vllm.v1.metrics.stats:SchedulerStats.iteration_details", "attribute", "vLLM's account of a step"),
    *(
        Contract(f"{_DETAILS}.{name}", "attribute", "what the step held")
        for name in ("num_ctx_requests", "num_ctx_tokens", "num_generation_tokens")
    ),
)
