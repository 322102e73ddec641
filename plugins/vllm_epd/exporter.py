"""What an instance says of its encoder outputs in ``/suite/v1/state``."""

from __future__ import annotations

from typing import Any

from vllm_epd.config import EpdConfig
from vllm_epd.options import CONNECTOR
from vllm_suite.catalog import NO_LOCAL_ENCODER
from vllm_suite.compat.slices import rules_for

PRODUCERS = ("ec_producer", "ec_both")


class EpdExporter:
    """What the control endpoint makes in each API server; see :mod:`vllm_suite.compat.endpoint`."""

    def __init__(self, client: Any) -> None:
        self._transfer = client.vllm_config.ec_transfer_config
        self._config = client.vllm_config

    def facts(self) -> dict[str, Any]:
        """``ec``: what the connector does, and where its items are claimed.

        The host is empty and the port 0 on an instance that serves none; the port alone is 0 where a free one is
        taken, which only the worker knows. Under data parallelism it is the port of the first engine.
        ``slices``: modalities of which the instance encodes slices; left out where there are none. ``encodes`` is
        false where the instance has no encoder, and left out elsewhere.
        """
        transfer = self._transfer
        if transfer is None or transfer.ec_connector != CONNECTOR:
            return {}
        host, port = "", 0
        if transfer.ec_role in PRODUCERS:
            host, port = EpdConfig.from_extra_config(transfer.ec_connector_extra_config or {}).address()
        ec = {"host": host, "port": port, "role": transfer.ec_role}
        if transfer.ec_role == "ec_producer" and (slices := sorted(rules_for(self._config.model_config))):
            ec["slices"] = slices
        return {"ec": ec | ({"encodes": False} if NO_LOCAL_ENCODER.on() else {})}

    async def run(self) -> None:
        """Nothing goes on beside the server: the connector's counters come with vLLM's own statistics."""
