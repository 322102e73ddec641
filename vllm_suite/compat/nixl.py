"""vLLM's pull-based NIXL connector, as the suite's connector builds on it.

The connector classes are public by name (``NixlConnector`` is documented); their scheduler and worker halves and
the metadata they exchange are not, so they pass through here and stand in the contract table.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlConnectorMetadata, ReqMeta
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics
from vllm.v1.metrics.utils import create_metric_per_engine

__all__ = [
    "KVConnectorMetadata",
    "KVConnectorPromMetrics",
    "KVConnectorRole",
    "KVConnectorStats",
    "KVConnectorTransferResults",
    "KVConnectorWorkerMetadata",
    "NixlConnectorMetadata",
    "NixlKVConnectorStats",
    "NixlPromMetrics",
    "NixlPullConnector",
    "NixlPullConnectorScheduler",
    "NixlPullConnectorWorker",
    "ReqMeta",
    "create_metric_per_engine",
    "quiet_progress_thread",
]


# ### PATCH START: nixl._api.nixlBind.nixlAgentConfig
# Why: NIXL's Python API sets pthrDelay = 0 with no argument or variable to change it, which makes the UCX progress
# thread call poll(fds, 0) for ever: 47-86 % of a core per idle worker on the CPU platform. The value is the sleep
# between polls; traffic wakes the thread through its file descriptors whatever it is.
# Remove when: nixl_agent_config takes the delay.
def quiet_progress_thread(delay_us: int) -> None:
    """Make NIXL agents created from now on in this process sleep ``delay_us`` microseconds between polls."""
    import nixl._api as api

    upstream: Any = api.nixlBind.nixlAgentConfig
    base = getattr(upstream, "_suite_base", upstream)

    class AgentConfig(base):  # type: ignore[misc, valid-type]
        _suite_base = base

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "pthrDelay" and value == 0:
                value = delay_us
            base.__setattr__(self, name, value)

    api.nixlBind.nixlAgentConfig = AgentConfig


# ### PATCH END
