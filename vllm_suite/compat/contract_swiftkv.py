"""Rows for what the SwiftKV plugin (plugins/vllm_swiftkv) and its compat modules use."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_CLIENT = "vllm.v1.engine.core_client:AsyncMPClient"
_V1 = "vllm.v1.sample.logits_processor.interface:LogitsProcessor"
_V2 = "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor"

_REGISTRY_ROWS = (
    # registry.py
    Contract("vllm:ModelRegistry", "attribute", "our classes by architecture"),
    Contract(
        "vllm.model_executor.models.registry:_ModelRegistry.register_model",
        "method",
        "lazy names",
        ("self", "model_arch", "model_cls"),
    ),
    Contract(
        "vllm.model_executor.models.registry",
        "literal",
        "a package is remembered by a hash of all its files, a module by its own only",
        value="__init__.py",
    ),
)

_ARMING_ROWS = (
    # model_files.py
    Contract("vllm.transformers_utils.utils:is_cloud_storage", "function", "weights not on a disk", ("model_or_path",)),
    Contract(f"{_ARGS}.model", "attribute", "whose config.json is read"),
    Contract(f"{_ARGS}.hf_config_path", "attribute", "whose config.json is read"),
    Contract(f"{_ARGS}.hf_overrides", "attribute", "applied to config.json"),
    Contract(f"{_ARGS}.hf_token", "attribute", "to read config.json"),
    Contract(f"{_ARGS}.revision", "attribute", "to read config.json"),
    Contract(f"{_ARGS}.config_format", "attribute", "whether there is a config.json"),
    # vllm_swiftkv/options.py
    Contract(f"{_ARGS}.speculative_config", "attribute", "refused for prefill-only instances"),
    Contract("vllm.config:KVTransferConfig.kv_connector_extra_config", "attribute", "children of MultiConnector"),
)

_EXPORTER_ROWS = (
    # worker_calls.py, vllm_swiftkv/exporter.py
    Contract(
        "vllm.engine.protocol:EngineClient.collective_rpc",
        "method",
        "reads the workers' counters",
        ("self", "method", "timeout", "args", "kwargs"),
    ),
    Contract("vllm.engine.protocol:EngineClient.errored", "property", "whether to ask on"),
    Contract("vllm.v1.engine.async_llm:AsyncLLM.engine_core", "instance", "several engines answer one by one"),
    Contract("vllm.v1.engine.core_client:MPClient.engine_ranks_managed", "instance", "engines of an API server"),
    Contract(f"{_CLIENT}.call_utility_all_async", "method", "all engines' answers", ("self", "method", "*args")),
    Contract("vllm.config:ParallelConfig.worker_extension_cls", "attribute", "whether workers have counters"),
    Contract("vllm.config:ParallelConfig._api_process_rank", "attribute", "of several API servers one counts"),
    Contract("vllm.config:CacheConfig.kv_sharing_fast_prefill", "attribute", "the skip is armed"),
    Contract("vllm.config:ModelConfig.architectures", "property", "whether a model is SwiftKV's"),
    Contract("vllm.config:ModelConfig.served_model_name", "attribute", "label of the series"),
    Contract("vllm.config:VllmConfig.additional_config", "attribute", "settings of the plugin"),
)


def _guard(base: str, name: str, *params: str) -> Contract:
    return Contract(f"{base}.{name}", "method", "implemented by the guard", ("self", *params))


_GUARD_ROWS = (
    # processors.py, vllm_swiftkv/prefill_guard.py
    Contract(_V1, "class", "base of the guard"),
    Contract(f"{_V1}.validate_params", "classmethod", "refuses requests", ("cls", "sampling_params")),
    _guard(_V1, "__init__", "vllm_config", "device", "is_pin_memory"),
    _guard(_V1, "apply", "logits"),
    _guard(_V1, "is_argmax_invariant"),
    _guard(_V1, "update_state", "batch_update"),
    Contract(_V2, "class", "base of the guard"),
    Contract(f"{_V2}.validate_params", "classmethod", "refuses requests", ("cls", "sampling_params")),
    _guard(_V2, "__init__", "vllm_config", "req_states"),
    _guard(_V2, "add_request", "req_idx", "sampling_params"),
    _guard(_V2, "apply", "logits", "ctx"),
    Contract("vllm.sampling_params:SamplingParams.extra_args", "attribute", "holds kv_transfer_params"),
    Contract("vllm.sampling_params:SamplingParams.max_tokens", "attribute", "1 for a hand-off"),
    Contract("vllm.sampling_params:SamplingParams.n", "attribute", "1 for a hand-off"),
    Contract("vllm.sampling_params:SamplingParams.logprobs", "attribute", "refused"),
    Contract("vllm.sampling_params:SamplingParams.prompt_logprobs", "attribute", "refused"),
    Contract("vllm.sampling_params:SamplingParams.logprob_token_ids", "attribute", "refused"),
    Contract("vllm.sampling_params:SamplingParams.prompt_logprob_token_ids", "attribute", "refused"),
)

_INPUT = "vllm.v1.engine.input_processor:InputProcessor"

_REQUEST_ROWS = (
    # prompt_logprobs.py
    Contract(_INPUT, "class", "patched: prompt_logprobs of 0"),
    Contract(f"{_INPUT}._validate_params", "method", "patched", ("self", "params", "supported_tasks")),
    Contract(f"{_INPUT}.vllm_config", "instance", "the skip is armed"),
    Contract("vllm.exceptions:VLLMValidationError", "class", "becomes status 400"),
)

_LLM = "vllm.entrypoints.llm:LLM"

_EVAL_ROWS = (
    # vllm_swiftkv/evaluate_worker.py: the engine inside lm-evaluation-harness's model class
    Contract(f"{_LLM}.llm_engine", "instance", "whether the skip is armed"),
    Contract("vllm.v1.engine.llm_engine:LLMEngine.vllm_config", "instance", "whether the skip is armed"),
    Contract(f"{_LLM}.collective_rpc", "method", "reads the counters", ("self", "method", "timeout", "args", "kwargs")),
)

ROWS: tuple[Contract, ...] = (
    *_REGISTRY_ROWS,
    *_ARMING_ROWS,
    *_EXPORTER_ROWS,
    *_GUARD_ROWS,
    *_REQUEST_ROWS,
    *_EVAL_ROWS,
)
