"""Rows for what the EC connector (plugins/vllm_epd) and its compat modules use."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_EC = "vllm.distributed.ec_transfer.ec_connector"
_BASE = f"{_EC}.base:ECConnectorBase"
_STATS = f"{_EC}.metrics:ECConnectorStats"
_PROM = f"{_EC}.metrics:ECConnectorPromMetrics"
_MANAGER = "vllm.v1.core.encoder_cache_manager:EncoderCacheManager"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"


def _overridden(owner: str, name: str, *params: str, more: bool = False) -> Contract:
    return Contract(f"{owner}.{name}", "method", "overridden", ("self", *params), more=more)


_CONNECTOR_ROWS = (
    Contract(_BASE, "class", "base of SuiteECConnector"),
    _overridden(_BASE, "__init__", "vllm_config", "role"),
    _overridden(_BASE, "shutdown"),
    _overridden(_BASE, "bind_connector_metadata", "connector_metadata"),
    _overridden(_BASE, "start_save_caches", "**kwargs"),
    _overridden(_BASE, "start_load_caches", "encoder_cache", "**kwargs"),
    _overridden(_BASE, "save_caches", "encoder_cache", "mm_hash", "**kwargs"),
    _overridden(_BASE, "get_finished", "finished_req_ids"),
    _overridden(_BASE, "ensure_cache_available", "request", "num_computed_tokens"),
    _overridden(_BASE, "has_cache_item", "identifier"),
    _overridden(_BASE, "update_state_after_alloc", "request", "index"),
    _overridden(_BASE, "build_connector_meta", "scheduler_output"),
    _overridden(_BASE, "take_unavailable_requests"),
    _overridden(_BASE, "request_finished", "request"),
    _overridden(_BASE, "has_pending_push_work"),
    _overridden(_BASE, "get_ec_connector_stats"),
    Contract(f"{_BASE}.build_ec_connector_stats", "classmethod", "overridden", ("cls", "data")),
    Contract(
        f"{_BASE}.build_prom_metrics",
        "classmethod",
        "overridden",
        ("cls", "vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    ),
    Contract(f"{_EC}.base:ECConnectorMetadata", "class", "base of a step's plan"),
    Contract(f"{_EC}.base:ECConnectorRole", "class", "scheduler or worker side"),
    Contract(f"{_EC}.utils:PlaceholderMetadataResolver", "class", "fields that size a placeholder"),
    Contract(f"{_EC}.utils:PlaceholderMetadataResolver.fields_for", "method", "by modality", ("self", "modality")),
    Contract(f"{_EC}.utils:collect_ec_item_metadata", "function", "a producer's answer", ("mm_features", "resolver")),
)

_MANAGER_ROWS = (
    Contract(_MANAGER, "class", "base of SuiteEncoderCacheManager"),
    Contract(f"{_MANAGER}.create_manager", "classmethod", "overridden", ("cls", "cache_size", "vllm_config")),
    _overridden(_MANAGER, "__init__", "cache_size"),
    _overridden(_MANAGER, "reset"),
    _overridden(_MANAGER, "check_and_update_cache", "request", "input_id"),
    _overridden(_MANAGER, "can_allocate", "request", "input_id", "encoder_compute_budget", "num_embeds_to_schedule"),
    Contract(f"{_MANAGER}.cached", "instance", "what the runner's cache has"),
    Contract(f"{_MANAGER}.freeable", "instance", "entries that nobody uses"),
    Contract(f"{_MANAGER}.freed", "instance", "entries that left"),
    Contract(f"{_MANAGER}.num_embeds_by_hash", "instance", "rows of an entry"),
    Contract(f"{_MANAGER}.num_free_slots", "instance", "rows that are free"),
    Contract(f"{_SCHEDULER}._try_schedule_encoder_inputs", "method", "asks the manager, ends chunks", more=True),
    Contract(f"{_SCHEDULER}._ec_transfer_pending", "method", "asks the connector", more=True),
)

_CONFIG_ROWS = (
    Contract("vllm.config.ec_transfer:ECTransferConfig.engine_id", "attribute", "names the control link"),
    Contract("vllm.config.ec_transfer:ECTransferConfig.ec_connector_extra_config", "attribute", "our settings"),
    Contract("vllm.config.ec_transfer:ECTransferConfig.mm_encoder_output_widths", "attribute", "expected widths"),
    Contract("vllm.config.ec_transfer:ECTransferConfig.is_ec_producer", "property", "directions"),
    Contract("vllm.config.ec_transfer:ECTransferConfig.is_ec_consumer", "property", "directions"),
    Contract("vllm.config.vllm:VllmConfig.num_prefill_lookahead_tokens", "property", "where a chunk may end"),
    Contract("vllm.config.cache:CacheConfig.mamba_cache_mode", "attribute", "whether a chunk may end anywhere"),
    Contract("vllm.config.scheduler:SchedulerConfig.enable_chunked_prefill", "attribute", "whether chunks may end"),
    Contract("vllm.config.model:ModelConfig.get_inputs_embeds_size", "method", "expected widths", ("self",)),
    Contract("vllm.config.model:ModelConfig.is_encoder_decoder", "property", "refused"),
    Contract("vllm.config.model:ModelConfig.hf_text_config", "instance", "part of the layout"),
    Contract("vllm.config.parallel:ParallelConfig.rank", "attribute", "names the control link"),
    Contract("vllm.config.parallel:ParallelConfig.data_parallel_index", "attribute", "names the control link"),
    Contract("vllm.v1.core.sched.output:NewRequestData.mm_features", "attribute", "items of a new request"),
    Contract("vllm.v1.core.sched.output:NewRequestData.req_id", "attribute", "whose items"),
    Contract("vllm.v1.core.sched.output:SchedulerOutput.scheduled_new_reqs", "attribute", "items to lease anew"),
    Contract("vllm.v1.core.sched.output:SchedulerOutput.scheduled_encoder_inputs", "attribute", "items to store"),
    Contract("vllm.v1.core.sched.output:SchedulerOutput.total_num_scheduled_tokens", "attribute", "an idle step"),
    Contract("vllm.multimodal.inputs:MultiModalFeatureSpec.data", "attribute", "whether there are media"),
    Contract("vllm.multimodal.inputs:MultiModalFeatureSpec.identifier", "attribute", "names an item"),
    Contract("vllm.multimodal.inputs:MultiModalFeatureSpec.modality", "attribute", "expected widths"),
    Contract("vllm.multimodal.inputs:MultiModalFeatureSpec.mm_position", "attribute", "where an item lies"),
    Contract("vllm.v1.request:RequestStatus.FINISHED_ABORTED", "attribute", "nothing to answer"),
    Contract("vllm.v1.request:RequestStatus.FINISHED_ERROR", "attribute", "nothing to answer"),
    Contract("vllm.v1.request:RequestStatus.FINISHED_IGNORED", "attribute", "nothing to answer"),
    Contract("vllm.v1.request:Request.ec_transfer_params", "instance", "references of a request"),
    Contract("vllm.v1.request:Request.get_num_encoder_embeds", "method", "rows of an item", ("self", "input_id")),
)

# A slice of an item is made of the fields that a family's processor gives it.
_SLICE_ROWS = (
    Contract("vllm.config.model:ModelConfig.architecture", "property", "which items are encoded unit by unit"),
    Contract(
        "vllm.config.multimodal:MultiModalConfig.is_multimodal_pruning_enabled", "method", "films stay whole", ("self",)
    ),
    Contract("vllm.config.multimodal:MultiModalConfig.mm_processor_cache_type", "attribute", "where items are cut"),
    Contract("vllm.multimodal.inputs:MultiModalFieldElem.data", "attribute", "pixels and their number"),
    Contract("vllm.multimodal.inputs:MultiModalKwargsItem", "class", "fields of an item by name"),
    *(
        Contract(f"vllm.model_executor.models.{module}", "literal", "field of an item", value=value)
        for module, values in (
            ("interns1", ("pixel_values", "image_num_patches", "pixel_values_videos", "video_num_patches")),
            ("internvl", ("pixel_values_flat", "image_num_patches", "pixel_values_flat_video", "video_num_patches")),
            ("qwen2_5_vl", ("pixel_values_videos", "video_grid_thw")),
            ("qwen3_vl", ("pixel_values_videos", "video_grid_thw")),
        )
        for value in values
    ),
)

_STATS_ROWS = (
    Contract(_STATS, "class", "base of our statistics"),
    Contract(f"{_STATS}.data", "attribute", "holds our series"),
    _overridden(_STATS, "reset"),
    _overridden(_STATS, "is_empty"),
    _overridden(_STATS, "aggregate", "other"),
    _overridden(_STATS, "reduce"),
    Contract(_PROM, "class", "base of our series"),
    _overridden(_PROM, "__init__", "vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    _overridden(_PROM, "observe", "transfer_stats_data", "engine_idx"),
    Contract(f"{_PROM}._counter_cls", "instance", "series that work with several API servers"),
    Contract(f"{_PROM}._gauge_cls", "instance", "series that work with several API servers"),
    Contract(f"{_PROM}._histogram_cls", "instance", "series that work with several API servers"),
)

ROWS: tuple[Contract, ...] = (*_CONNECTOR_ROWS, *_MANAGER_ROWS, *_CONFIG_ROWS, *_SLICE_ROWS, *_STATS_ROWS)
