"""Rows for the length-aware scheduler: `length_scheduler`, `scheduler`, and what plugin dler reads of a request."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_QUEUE = "vllm.v1.core.sched.request_queue:RequestQueue"
_REQUEST = "vllm.v1.request:Request"
_STATUS = "vllm.v1.request:RequestStatus"
_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
_POOL = "vllm.v1.core.block_pool:BlockPool"


def _extended(name: str, *params: str, more: bool = False) -> Contract:
    return Contract(f"{_SCHEDULER}.{name}", "method", "overridden, calls super", ("self", *params), more)


def _held(name: str, why: str) -> Contract:
    return Contract(f"{_SCHEDULER}.{name}", "instance", why)


def _queued(name: str, *params: str) -> Contract:
    return Contract(f"{_QUEUE}.{name}", "method", "implemented: vLLM calls no other", ("self", *params))


_QUEUE_ROWS = (
    Contract(_QUEUE, "class", "base of the waiting queue"),
    _queued("add_request", "request"),
    _queued("pop_request"),
    _queued("peek_request"),
    _queued("prepend_request", "request"),
    _queued("prepend_requests", "requests"),
    _queued("remove_request", "request"),
    _queued("remove_requests", "requests"),
    _queued("__bool__"),
    _queued("__len__"),
    _queued("__iter__"),
    Contract(
        "vllm.v1.core.sched.request_queue:SchedulingPolicy.FCFS", "attribute", "the last of the running gives way"
    ),
    Contract("vllm.v1.core.sched.request_queue:SchedulingPolicy", "class", "set inside, whatever the user chose"),
)

_SCHEDULER_ROWS = (
    _extended("add_request", "request"),
    _extended("_update_request_as_session", "session", "update"),
    _extended("update_from_output", "scheduler_output", "model_runner_output"),
    _extended("_preempt_request", "request", more=True),
    _extended("_free_request", "request", more=True),
    _extended("shutdown"),
    Contract(f"{_SCHEDULER}.finish_requests", "method", "ends a request", ("self", "request_ids", "finished_status")),
    _held("policy", "set to first come, first served"),
    _held("waiting", "replaced"),
    _held("kv_holding_waiting", "replaced where there is a connector"),
    _held("running", "sorted in place before a step that may evict"),
    _held("requests", "requests by id"),
    _held("connector", "whether requests wait with their KV"),
    _held("vllm_config", "the policy's settings"),
    _held("block_size", "tokens of a block where there is no group"),
    _held("kv_cache_config", "blocks that a step may need"),
    _held("kv_cache_manager", "cached prompts and free blocks"),
    _held("max_num_scheduled_tokens", "blocks that a step may need"),
    _held("max_num_active_reqs", "lowered for a step by the gate"),
    _held("num_waiting_for_streaming_input", "counted among those that run"),
    _held("_inflight_prefills", "blocks that a step may need"),
    _held("num_spec_tokens", "blocks that a step may need"),
    _held("num_lookahead_tokens", "blocks that a step may need"),
    Contract(f"{_MANAGER}.get_computed_blocks", "method", "cached prompt tokens", ("self", "request"), more=True),
    Contract(f"{_MANAGER}.block_pool", "instance", "free blocks"),
    Contract(f"{_MANAGER}.watermark_blocks", "instance", "raised: room for those that run"),
    Contract(f"{_MANAGER}.enable_kv_cache_events", "instance", "whether a lookup may be published"),
    Contract(f"{_POOL}.num_gpu_blocks", "instance", "how much the KV cache holds"),
    Contract(f"{_POOL}.get_num_free_blocks", "method", "free blocks", ("self",)),
    Contract("vllm.v1.kv_cache_interface:KVCacheConfig.kv_cache_groups", "attribute", "blocks that a step may need"),
    Contract("vllm.v1.kv_cache_interface:KVCacheGroupSpec.kv_cache_spec", "attribute", "blocks that a step may need"),
    Contract("vllm.v1.kv_cache_interface:KVCacheSpec.block_size", "attribute", "blocks that a step may need"),
    Contract("vllm.v1.core.sched.output:SchedulerOutput.scheduled_new_reqs", "attribute", "who began to run"),
    Contract("vllm.v1.core.sched.output:SchedulerOutput.scheduled_cached_reqs", "attribute", "who runs again"),
    Contract("vllm.v1.core.sched.output:CachedRequestData.resumed_req_ids", "attribute", "who runs again"),
    Contract("vllm.v1.core.sched.output:NewRequestData.req_id", "attribute", "who began to run"),
)

_REQUEST_ROWS = (
    *(
        Contract(f"{_REQUEST}.{name}", "instance", why)
        for name, why in (
            ("request_id", "names a request, and a sample of one with n > 1"),
            ("arrival_time", "the key begins with it"),
            ("priority", "goes before the key"),
            ("max_tokens", "cuts the estimate; lowered by a cap"),
            ("num_prompt_tokens", "size of the prompt"),
            ("num_computed_tokens", "size of a session's next turn"),
            ("sampling_params", "arguments and manner of sampling"),
            ("prompt_token_ids", "class: the same beginning"),
            ("session_id", "class"),
            ("lora_request", "class"),
            ("cache_salt", "class: the same tenant"),
            ("structured_output_request", "class"),
            ("kv_transfer_params", "a hand-off: no prompt to compute, or no answer to generate"),
            ("block_hashes", "cached prompt tokens"),
            ("client_index", "who gets the answer"),
            ("trace_headers", "of the answer"),
            ("status", "how a request ended"),
        )
    ),
    Contract(f"{_REQUEST}.num_output_tokens", "property", "length so far"),
    Contract("vllm.lora.request:LoRARequest.lora_name", "attribute", "class"),
    Contract(f"{_REQUEST}.is_finished", "method", "nothing to end", ("self",)),
    Contract(f"{_STATUS}.FINISHED_STOPPED", "attribute", "a length that is known"),
    Contract(f"{_STATUS}.FINISHED_LENGTH_CAPPED", "attribute", "a length that was cut"),
    Contract(f"{_STATUS}.FINISHED_REPETITION", "attribute", "a length that was cut"),
    Contract(f"{_STATUS}.FINISHED_ABORTED", "attribute", "a length that was cut"),
    Contract("vllm.sampling_params:SamplingParams.extra_args", "attribute", "vllm_xargs"),
    Contract("vllm.sampling_params:SamplingParams.temperature", "attribute", "manner of sampling"),
    Contract("vllm.sampling_params:SamplingParams.thinking_token_budget", "attribute", "manner of sampling"),
    Contract(
        "vllm.v1.engine.parallel_sampling:ParentRequest.get_child_info",
        "method",
        "names samples by number and parent",
        ("self", "index"),
    ),
)

_ENGINE_ROWS = (
    Contract("vllm.v1.engine.core:EngineCore", "class", "answers what the scheduler counted"),
    Contract("vllm.v1.engine.core:EngineCore.scheduler", "instance", "which scheduler"),
    Contract("vllm.config:SchedulerConfig.scheduler_cls", "attribute", "where the factory is named"),
    Contract("vllm.config:SchedulerConfig.policy", "attribute", "whether the user's priority counts"),
    Contract("vllm.config.parallel:ParallelConfig.data_parallel_size", "attribute", "a file for each engine"),
    Contract("vllm.config.parallel:ParallelConfig.data_parallel_index", "attribute", "a file for each engine"),
    Contract("vllm.config:VllmConfig.additional_config", "attribute", "settings"),
)

ROWS: tuple[Contract, ...] = (*_QUEUE_ROWS, *_SCHEDULER_ROWS, *_REQUEST_ROWS, *_ENGINE_ROWS)
