"""Rows for what the bootstrap and the control endpoint use."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_PLUGINS = "vllm.plugins"
_ENDPOINT = "vllm.plugins.endpoint_plugins.interface:EndpointPlugin"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory"

ROWS: tuple[Contract, ...] = (
    # hooks.py
    Contract(f"{_ARGS}.add_cli_args", "staticmethod", "wrapped to add --plugins", ("parser",)),
    Contract(f"{_ARGS}.from_cli_args", "classmethod", "wrapped to see the API port", ("cls", "args")),
    Contract(
        f"{_ARGS}.create_engine_config",
        "method",
        "wrapped to set options before they are read",
        ("self", "usage_context", "headless"),
    ),
    Contract(
        "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
        "staticmethod",
        "loads general plugins, then calls EngineArgs.add_cli_args, which is by then wrapped",
        ("parser", "async_args_only"),
    ),
    Contract("vllm.utils.argparse_utils:FlexibleArgumentParser", "class", "carries --plugins"),
    # settings.py
    Contract(f"{_ARGS}.kv_transfer_config", "attribute", "set for disagg"),
    Contract(f"{_ARGS}.ec_transfer_config", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.ec_manager_config", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.scheduler_cls", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.limit_mm_per_prompt", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.enable_mm_embeds", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.kv_sharing_fast_prefill", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.worker_extension_cls", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.additional_config", "attribute", "may be set by a plugin"),
    Contract(f"{_ARGS}.logits_processors", "attribute", "may be added to by a plugin"),
    Contract("vllm.config:KVTransferConfig", "class", "type of kv_transfer_config"),
    Contract("vllm.config:KVTransferConfig.kv_connector", "attribute", "set for disagg"),
    Contract("vllm.config:KVTransferConfig.kv_connector_module_path", "attribute", "set for disagg"),
    Contract("vllm.config:KVTransferConfig.kv_role", "attribute", "set for disagg"),
    Contract("vllm.config:KVTransferConfig.kv_load_failure_policy", "attribute", "set for disagg"),
    Contract("vllm.config:KVTransferConfig.kv_buffer_device", "attribute", "set for disagg on CPU"),
    Contract("vllm.config:ECTransferConfig", "class", "type of ec_transfer_config"),
    Contract("vllm.config:EncoderCacheManagerConfig", "class", "type of ec_manager_config"),
    Contract(
        "vllm.config:EncoderCacheManagerConfig.encoder_cache_manager_cls", "attribute", "None where the user gave none"
    ),
    # engine.py
    Contract("vllm.platforms:current_platform", "attribute", "its device_type decides the KV buffer"),
    Contract("vllm.platforms.interface:Platform.device_type", "attribute", "decides the KV buffer"),
    Contract("vllm.usage.usage_lib:UsageContext.OPENAI_API_SERVER", "attribute", "tells a server from LLM(...)"),
    # environment.py
    Contract("vllm.envs:environment_variables", "attribute", "the variables vLLM does not warn about"),
    # allowlist.py
    Contract(f"{_PLUGINS}:DEFAULT_PLUGINS_GROUP", "attribute", "a group to list", value="vllm.general_plugins"),
    Contract(f"{_PLUGINS}:PLATFORM_PLUGINS_GROUP", "attribute", "a group to list", value="vllm.platform_plugins"),
    Contract(
        f"{_PLUGINS}:IO_PROCESSOR_PLUGINS_GROUP", "attribute", "a group to list", value="vllm.io_processor_plugins"
    ),
    Contract(f"{_PLUGINS}:STAT_LOGGER_PLUGINS_GROUP", "attribute", "a group to list", value="vllm.stat_logger_plugins"),
    Contract(f"{_PLUGINS}:ENDPOINT_PLUGINS_GROUP", "attribute", "a group to list", value="vllm.endpoint_plugins"),
    Contract(f"{_PLUGINS}:load_endpoint_plugins", "function", "wrapped where names clash", ("supported_tasks",)),
    Contract(
        "vllm.plugins.lora_resolvers.hf_hub_resolver",
        "literal",
        "the one default plugin that being named turns on",
        value="lora_hf_hub_resolver",
    ),
    # connectors.py
    Contract(f"{_FACTORY}._registry", "attribute", "registering a name twice raises"),
    Contract(
        f"{_FACTORY}.register_connector", "classmethod", "lazy names", ("cls", "name", "module_path", "class_name")
    ),
    # endpoint.py
    Contract(f"{_ENDPOINT}.attach_router", "method", "implemented", ("self", "app")),
    Contract(f"{_ENDPOINT}.init_state", "method", "implemented", ("self", "engine_client", "state", "args")),
    Contract("vllm.config:VllmConfig.kv_transfer_config", "attribute", "served as kv_connector"),
    Contract("vllm.config:ModelConfig.max_model_len", "attribute", "served"),
    Contract("vllm.config:CacheConfig.block_size", "attribute", "served"),
    Contract("vllm.config:CacheConfig.enable_prefix_caching", "attribute", "served"),
    # engine_state.py
    Contract("vllm.engine.protocol:EngineClient.check_health", "method", "readiness", ("self",)),
    Contract("vllm.engine.protocol:EngineClient.is_sleeping", "method", "readiness", ("self",)),
    Contract("vllm.engine.protocol:EngineClient.is_paused", "method", "readiness", ("self",)),
    Contract("vllm.v1.engine.exceptions:EngineDeadError", "class", "what check_health raises"),
    Contract(
        "vllm.v1.engine.async_llm:AsyncLLM.get_num_queued_tokens", "method", "served as waiting_tokens", ("self",)
    ),
    # router/upstream.py, which imports nothing of vLLM
    Contract(
        "vllm.v1.engine.exceptions",
        "literal",
        "how an API server tells of an ended engine",
        value="EngineCore encountered an issue. See stack trace (above) for the root cause.",
    ),
    # role_limits.py, role_engine.py, role_routes.py
    Contract(f"{_SCHEDULER}.max_num_scheduled_tokens", "instance", "lowered for a role"),
    Contract(f"{_SCHEDULER}.max_num_active_reqs", "instance", "lowered for a role"),
    Contract(f"{_SCHEDULER}.num_spec_tokens", "instance", "tokens that a running request takes of a step"),
    Contract(f"{_SCHEDULER}.get_num_unfinished_requests", "method", "drained or not", ("self",)),
    Contract("vllm.config:SchedulerConfig.long_prefill_token_threshold", "attribute", "set for a role"),
    Contract("vllm.config:SchedulerConfig.enable_chunked_prefill", "attribute", "whether steps may shrink"),
    Contract("vllm.config:SchedulerConfig.disable_chunked_mm_input", "attribute", "whether steps may shrink"),
    Contract("vllm.config:ParallelConfig._api_process_count", "attribute", "several API servers do not switch"),
    Contract("vllm.v1.engine.core:EngineCore.scheduler", "instance", "whose limits change"),
    Contract("vllm.v1.engine.async_llm:AsyncLLM.output_processor", "instance", "drained or not"),
    Contract(
        "vllm.v1.engine.output_processor:OutputProcessor.get_num_unfinished_requests", "method", "drained", ("self",)
    ),
    # role_queue.py
    Contract(f"{_SCHEDULER}.requests", "instance", "looked through for those that wait"),
    Contract("vllm.v1.request:RequestStatus.WAITING", "attribute", "queued"),
    Contract("vllm.v1.request:Request.status", "instance", "queued or not"),
    Contract("vllm.v1.request:Request.num_computed_tokens", "instance", "begun or not"),
    Contract("vllm.v1.request:Request.num_output_tokens", "property", "begun or not"),
    Contract("vllm.v1.request:Request.num_preemptions", "instance", "begun or not"),
    Contract("vllm.v1.request:Request.kv_transfer_params", "instance", "whether it has a reference"),
    Contract("vllm.v1.engine.output_processor:OutputProcessor.request_states", "instance", "requests by id"),
    Contract("vllm.v1.engine.output_processor:RequestState.external_req_id", "instance", "how the server calls it"),
    Contract("vllm.v1.engine.output_processor:RequestState.parent_req", "instance", "whether sequences are done"),
    Contract("vllm.v1.engine.parallel_sampling:ParentRequest.n", "property", "how many there are"),
    Contract("vllm.entrypoints.openai.completion.serving", "literal", "how the server calls it", value="cmpl-"),
    Contract(
        "vllm.entrypoints.openai.chat_completion.serving", "literal", "how the server calls it", value="chatcmpl-"
    ),
    Contract("vllm.entrypoints.serve.engine.serving", "literal", "where the name is from", value="X-Request-Id"),
    Contract("vllm.v1.metrics.prometheus:get_prometheus_registry", "function", "where the gauges are", ()),
    Contract("vllm.v1.metrics.loggers", "literal", "gauge read for load", value="vllm:num_requests_running"),
    Contract("vllm.v1.metrics.loggers", "literal", "gauge read for load", value="vllm:num_requests_waiting"),
    Contract("vllm.v1.metrics.loggers", "literal", "gauge read for load", value="vllm:kv_cache_usage_perc"),
)
