"""vLLM's pull connector with the two CPU repairs of the suite and nothing else.

Between this class and ``SuiteNixlConnector`` lie the fence, the leases and the deadlines; between this class and
``NixlConnector`` lie the spinning progress thread and the pinning of the model's thread.
"""

from __future__ import annotations

import os
from typing import Any

from vllm_suite.compat.nixl import KVConnectorRole, NixlPullConnector, quiet_progress_thread


class QuietNixlConnector(NixlPullConnector):  # type: ignore[misc]
    """Stock transfers; the progress thread sleeps between polls and the model keeps its cores."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        cores = os.sched_getaffinity(0)
        if role == KVConnectorRole.WORKER:
            quiet_progress_thread(1000)
        super().__init__(vllm_config, role, kv_cache_config)
        os.sched_setaffinity(0, cores)
