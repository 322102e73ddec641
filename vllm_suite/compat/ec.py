"""vLLM's encoder-cache connector, as the suite's connector builds on it.

The interface is public by name and documented for connectors; what else is needed here (the manager, the metrics'
bases and the fields that a family publishes beside its embeddings) is not, and stands in the contract table.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats
from vllm.distributed.ec_transfer.ec_connector.utils import PlaceholderMetadataResolver, collect_ec_item_metadata
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.request import RequestStatus

__all__ = [
    "ECConnectorBase",
    "ECConnectorMetadata",
    "ECConnectorPromMetrics",
    "ECConnectorRole",
    "ECConnectorStats",
    "EncoderCacheManager",
    "PlaceholderMetadataResolver",
    "aborted",
    "collect_ec_item_metadata",
    "device_of_worker",
]


def aborted(request: Any) -> bool:
    """Whether a finished request was given up or failed: nothing of it is passed on."""
    failed = (RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_IGNORED, RequestStatus.FINISHED_ERROR)
    return request.status in failed


def device_of_worker() -> Any:
    """The ``torch.device`` that this worker's runner uses. Call after the worker has set its device."""
    import torch
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    return torch.device("cpu") if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
