"""Register the suite's connectors with vLLM by name, without importing them."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_suite.catalog import LazyClass


def register_kv_connectors(classes: Iterable[LazyClass]) -> None:
    """Make ``--kv-transfer-config '{"kv_connector": NAME}'`` work in this process. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    for item in classes:
        if item.name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(item.name, item.module, item.name)
