"""What an instance says of its KV blocks in ``/suite/v1/state``, so that routers pair instances that understand each
other. The fence of the reference stays what decides."""

from __future__ import annotations

from typing import Any

from vllm_disagg.fence import layout_digest
from vllm_suite.compat.fence import model_digest
from vllm_suite.handoff import digest


class DisaggExporter:
    """What the control endpoint makes in each API server; see :mod:`vllm_suite.compat.endpoint`."""

    def __init__(self, client: Any) -> None:
        config = client.vllm_config
        has = config.kv_transfer_config is not None
        self._kv = digest(model_digest(config), layout_digest(config)) if has else None

    def facts(self) -> dict[str, Any]:
        """``kv``: digest of model and KV layout as references carry them; left out where no blocks are handed over."""
        return {} if self._kv is None else {"kv": self._kv}

    async def run(self) -> None:
        """Nothing: the engine's own logger exports the series."""
