"""Rows for what the KV connector (plugins/vllm_disagg) and its compat modules use."""

from __future__ import annotations

from vllm_suite.compat.contracts import Contract

_V1 = "vllm.distributed.kv_transfer.kv_connector.v1"
_CONNECTOR = f"{_V1}.nixl.connector:NixlPullConnector"
_SCHEDULER = f"{_V1}.nixl.pull_scheduler:NixlPullConnectorScheduler"
_WORKER = f"{_V1}.nixl.pull_worker:NixlPullConnectorWorker"
_STATS = f"{_V1}.nixl.stats:NixlKVConnectorStats"
_PROM = f"{_V1}.nixl.stats:NixlPromMetrics"


def _extended(owner: str, name: str, *params: str) -> Contract:
    return Contract(f"{owner}.{name}", "method", "overridden, calls super", ("self", *params))


_CONNECTOR_ROWS = (
    Contract(_CONNECTOR, "class", "base of SuiteNixlConnector"),
    _extended(_CONNECTOR, "__init__", "vllm_config", "role", "kv_cache_config"),
    _extended(_CONNECTOR, "get_kv_connector_stats"),
    Contract(f"{_CONNECTOR}.build_kv_connector_stats", "classmethod", "overridden", ("cls", "data")),
    Contract(
        f"{_CONNECTOR}.build_prom_metrics",
        "classmethod",
        "overridden",
        ("cls", "vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    ),
    Contract(f"{_CONNECTOR}.engine_id", "instance", "handed to our scheduler and worker"),
    Contract(f"{_V1}.base:KVConnectorRole", "class", "scheduler or worker side"),
    Contract(f"{_V1}.base:KVConnectorMetadata", "class", "type of what build_connector_meta returns"),
    _extended(_CONNECTOR, "build_connector_worker_meta"),
    Contract(f"{_V1}.base:KVConnectorWorkerMetadata", "class", "base of the workers' reports to the scheduler"),
    Contract(f"{_V1}.base:KVConnectorWorkerMetadata.aggregate", "method", "overridden", ("self", "other")),
    Contract(f"{_V1}.base:KVConnectorTransferResults", "class", "what get_transfer_results returns"),
)

_SCHEDULER_ROWS = (
    Contract(_SCHEDULER, "class", "base of the scheduler side"),
    _extended(_SCHEDULER, "__init__", "vllm_config", "engine_id", "kv_cache_config"),
    _extended(_SCHEDULER, "shutdown"),
    _extended(_SCHEDULER, "on_new_request", "request"),
    _extended(_SCHEDULER, "get_num_new_matched_tokens", "request", "num_computed_tokens"),
    _extended(_SCHEDULER, "update_state_after_alloc", "request", "blocks", "num_external_tokens"),
    _extended(_SCHEDULER, "build_connector_meta", "scheduler_output"),
    _extended(_SCHEDULER, "update_connector_output", "connector_output"),
    _extended(_SCHEDULER, "request_finished", "request", "block_ids"),
    Contract("vllm.v1.request:Request.trace_headers", "instance", "whose trace a pull is a span of"),
    Contract(f"{_SCHEDULER}._get_remote_prefill_token_count", "method", "tokens a pull brings"),
    Contract(f"{_SCHEDULER}._reqs_need_send", "instance", "blocks held for a peer"),
    Contract(f"{_SCHEDULER}._stop_heartbeat", "method", "a refused reference needs no heartbeats"),
    Contract(f"{_SCHEDULER}.side_channel_host", "instance", "part of the reference"),
    Contract(f"{_SCHEDULER}.side_channel_port", "instance", "probed at start-up"),
    Contract(f"{_SCHEDULER}.transfer_tp_size", "instance", "part of the reference"),
    Contract(f"{_V1}.nixl.metadata:NixlConnectorMetadata", "class", "orders of one step"),
    Contract(f"{_V1}.nixl.metadata:ReqMeta", "class", "one request in the orders"),
)

_WORKER_ROWS = (
    Contract(_WORKER, "class", "base of the worker side"),
    _extended(_WORKER, "__init__", "vllm_config", "engine_id", "kv_cache_config"),
    _extended(_WORKER, "start_load_kv", "metadata"),
    _extended(_WORKER, "_read_blocks_for_req", "req_id", "meta"),
    Contract(f"{_WORKER}._nixl_handshake", "method", "overridden, calls super", ("self", "host", "port"), more=True),
    _extended(_WORKER, "get_transfer_results"),
    _extended(_WORKER, "get_block_ids_with_load_errors"),
    Contract(f"{_WORKER}._cleanup_remote_engine", "method", "forget a peer"),
    Contract(f"{_WORKER}._try_release_xfer_handle", "method", "end a transfer past its deadline"),
    Contract(f"{_WORKER}._physical_blocks_per_logical_kv_block", "instance", "bytes of a pull"),
    Contract(
        f"{_WORKER}._compute_desc_ids",
        "method",
        "overridden, calls super; affine in the block ids of a single attention group",
        ("self", "block_ids"),
        more=True,
    ),
    Contract(f"{_WORKER}._has_mamba", "instance", "state regions have descriptors of another shape"),
    Contract(f"{_WORKER}._handshake_futures", "instance", "a handshake is under way"),
    Contract(f"{_WORKER}._recv_failures", "instance", "pulls that failed"),
    Contract(f"{_WORKER}._recving_metadata", "instance", "pulls under way"),
    Contract(f"{_WORKER}._recving_transfers", "instance", "pulls under way"),
    Contract(f"{_WORKER}._remote_agents", "instance", "peers with a finished handshake"),
    Contract(f"{_WORKER}._reqs_to_process", "instance", "requests whose blocks are held"),
    Contract(f"{_WORKER}._reqs_to_send", "instance", "requests whose blocks are held"),
    Contract(f"{_WORKER}.block_len_per_layer", "instance", "bytes of a pull"),
    Contract(f"{_WORKER}.consumer_notification_counts_by_req", "instance", "who has fetched"),
    Contract(f"{_WORKER}.expected_consumer_notifications_by_req", "instance", "who has to fetch"),
    Contract(f"{_WORKER}.nixl_wrapper", "instance", "the NIXL agent"),
)

_STATS_ROWS = (
    Contract(_STATS, "class", "base of our statistics"),
    _extended(_STATS, "reset"),
    _extended(_STATS, "is_empty"),
    _extended(_STATS, "clone_and_reset"),
    _extended(_STATS, "aggregate", "other"),
    _extended(_STATS, "reduce"),
    Contract(f"{_V1}.metrics:KVConnectorStats", "class", "the channel to the API server"),
    Contract(f"{_V1}.metrics:KVConnectorStats.data", "attribute", "holds our series as well"),
    Contract(_PROM, "class", "base of our series"),
    _extended(_PROM, "__init__", "vllm_config", "metric_types", "labelnames", "per_engine_labelvalues"),
    _extended(_PROM, "observe", "transfer_stats_data", "engine_idx"),
    Contract(f"{_V1}.metrics:KVConnectorPromMetrics", "class", "type of our series"),
    Contract(f"{_PROM}._counter_cls", "instance", "series that work with several API servers"),
    Contract(f"{_PROM}._gauge_cls", "instance", "series that work with several API servers"),
    Contract(f"{_PROM}._histogram_cls", "instance", "series that work with several API servers"),
)

_IDLE_ROWS = (
    Contract("vllm.v1.engine.core:EngineCoreProc", "class", "patched: sleep while only the connector has work"),
    Contract("vllm.v1.engine.core:EngineCoreProc._process_engine_step", "method", "patched", ("self",)),
    Contract("vllm.v1.engine.core:EngineCoreProc.input_queue", "instance", "what the sleep waits on"),
    Contract("vllm.v1.engine:EngineCoreRequestType.WAKEUP", "attribute", "ends the sleep"),
)

ROWS: tuple[Contract, ...] = (
    *_CONNECTOR_ROWS,
    *_SCHEDULER_ROWS,
    *_WORKER_ROWS,
    *_STATS_ROWS,
    *_IDLE_ROWS,
)
