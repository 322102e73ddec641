"""Rows for the options of plugin epd, for encode-only requests and for the state route's part about encoders."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_INTERFACE = "vllm.v1.core.sched.interface:SchedulerInterface"
_MANAGER = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_REQUEST = "vllm.v1.request:Request"
_OUTPUT = "vllm.v1.engine:EngineCoreOutput"
_POSITION = "vllm.multimodal.inputs:PlaceholderRange"


def _extended(name: str, *params: str, more: bool = False) -> Contract:
    return Contract(f"{_SCHEDULER}.{name}", "method", "overridden, calls super", ("self", *params), more)


_OPTIONS_ROWS = (
    Contract(f"{_ARGS}.language_model_only", "attribute", "nothing to encode"),
    Contract(f"{_ARGS}.pipeline_parallel_size", "attribute", "refused"),
    Contract(f"{_ARGS}.worker_cls", "attribute", "whether the user named a worker"),
    Contract("vllm.triton_utils:HAS_TRITON", "attribute", "doctor: which model runners"),
    Contract("vllm.model_executor.models.registry:_MULTIMODAL_MODELS", "attribute", "tells a text-only model"),
)

_SCHEDULER_ROWS = (
    Contract("vllm.v1.core.sched.async_scheduler:AsyncScheduler", "class", "base of a scheduler that encodes only"),
    Contract(_SCHEDULER, "class", "base of a scheduler that encodes only"),
    Contract("vllm.config:SchedulerConfig.async_scheduling", "attribute", "which of the two"),
    _extended("add_request", "request"),
    Contract(f"{_SCHEDULER}.schedule", "method", "overridden, calls super"),
    _extended(
        "_try_schedule_encoder_inputs",
        "request",
        "num_computed_tokens",
        "num_new_tokens",
        "encoder_compute_budget",
        "shift_computed_tokens",
    ),
    _extended("_free_encoder_inputs", "request"),
    _extended("update_from_output", "scheduler_output", "model_runner_output"),
    _extended("_free_request", "request", more=True),
    _extended("_preempt_request", "request", more=True),
    Contract(f"{_SCHEDULER}._free_encoder_input", "method", "an encoded item that no token needs", more=True),
    Contract(f"{_SCHEDULER}.finish_requests", "method", "ends a request", ("self", "request_ids", "finished_status")),
    Contract(f"{_SCHEDULER}.requests", "instance", "requests by id"),
    Contract(f"{_SCHEDULER}.ec_connector", "instance", "whether there is one, and whether it stores"),
    Contract(f"{_SCHEDULER}.encoder_cache_manager", "instance", "what a request keeps"),
    Contract(f"{_SCHEDULER}.is_encoder_decoder", "instance", "such requests are left alone"),
    Contract(f"{_SCHEDULER}.is_mm_encoder_only", "instance", "such an instance is left alone"),
    Contract(f"{_SCHEDULER}.num_prefill_lookahead", "instance", "how far a drafter reads ahead"),
    Contract(f"{_MANAGER}.get_cached_input_ids", "method", "what a request keeps", ("self", "request")),
    Contract("vllm.v1.core.sched.output:SchedulerOutput.num_scheduled_tokens", "attribute", "requests of a step"),
    Contract("vllm.v1.request:RequestStatus.FINISHED_STOPPED", "attribute", "how a request ends"),
    Contract(f"{_REQUEST}.ec_transfer_params", "instance", "carries the mark"),
    Contract(f"{_REQUEST}.mm_features", "instance", "items of a request"),
    Contract(f"{_REQUEST}.skip_reading_prefix_cache", "instance", "cached tokens would hide items"),
    Contract(f"{_REQUEST}.resumable", "instance", "streaming sessions are left alone"),
    Contract(f"{_REQUEST}.client_index", "instance", "who gets the answer"),
    Contract(f"{_REQUEST}.get_finished_reason", "method", "of the answer", ("self",)),
    Contract(f"{_REQUEST}.take_events", "method", "of the answer", ("self",)),
    Contract(f"{_REQUEST}.num_tokens", "property", "end of the prompt"),
    Contract(f"{_POSITION}.offset", "attribute", "first token of an item"),
    Contract(f"{_POSITION}.length", "attribute", "tokens of an item"),
    Contract(f"{_OUTPUT}.ec_transfer_params", "attribute", "the connector's answer"),
    Contract(f"{_OUTPUT}.kv_transfer_params", "attribute", "the connector's answer"),
    Contract(f"{_OUTPUT}.finish_reason", "attribute", "of the answer"),
    Contract("vllm.v1.engine:EngineCoreOutputs.outputs", "attribute", "where answers go"),
)

# engine_idle.py, beside the rows of the KV connector
_IDLE_ROWS = (
    Contract(
        "vllm.v1.core.sched.interface:SchedulerInterface.get_kv_connector",
        "method",
        "asked how long it waits",
        ("self",),
    ),
    Contract("vllm.v1.core.sched.interface:SchedulerInterface.get_ec_connector", "method", "asked as well", ("self",)),
    Contract(
        "vllm.v1.core.sched.interface:SchedulerInterface.get_num_unfinished_requests",
        "method",
        "told to both",
        ("self",),
    ),
)

ROWS: tuple[Contract, ...] = (*_OPTIONS_ROWS, *_SCHEDULER_ROWS, *_IDLE_ROWS)
