"""Engine settings for tiny models on CPU: the fleets of the tests and of the soak are the same in these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer", "any": "kv_both"}


def tiny_engine() -> dict[str, Any]:
    """The section `engine` of a fleet file: answers equal whatever else runs, small and ready in seconds."""
    return {
        "dtype": "float32",
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "generation_config": "vllm",
    }


def tiny_transfer(role: str, suite: Mapping[str, Any]) -> dict[str, Any]:
    """`kv_transfer_config` of a `prefill`, `decode` or `any` instance; `suite` are settings of the disagg plugin."""
    return {
        "kv_connector": "SuiteNixlConnector",
        "kv_role": _KV_ROLES[role],
        "kv_buffer_device": "cpu",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"suite": dict(suite)},
    }
