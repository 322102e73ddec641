"""Settings of the connector: the ``suite`` object inside ``ec_connector_extra_config``.

Example::

    --ec-transfer-config '{"ec_connector": "SuiteECConnector", "ec_connector_module_path": "vllm_epd.connector",
                           "ec_role": "ec_producer",
                           "ec_connector_extra_config": {"suite": {"pool_bytes": 1073741824}}}'
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_suite.plugin_config import ConfigError as ConfigError
from vllm_suite.plugin_config import checked

# Blocks of one tier. The pieces of a wholly scattered item must fit one message of the item channel.
MAX_BLOCKS = 32768

HOST_ENV = "VLLM_EC_SIDE_CHANNEL_HOST"
PORT_ENV = "VLLM_EC_SIDE_CHANNEL_PORT"
_HOST_ENVS = (HOST_ENV, "VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_HOST_IP")


class EpdConfig(BaseModel):
    """How encoder outputs are kept, leased, claimed and read. Times are seconds, sizes are bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    pool_bytes: int = Field(256 << 20, gt=0, description="Producer: memory for items, on the runner's device.")
    host_pool_bytes: int = Field(0, ge=0, description="Producer: a second tier in host memory; 0 for none.")
    block_bytes: int = Field(64 << 10, ge=4096, description="Unit in which both tiers are given out.")
    receive_bytes: int = Field(128 << 20, gt=0, description="Consumer: memory that items are read into.")
    lease_s: float = Field(30.0, gt=0, description="How long a producer keeps an item that nobody has read.")
    hold_s: float = Field(5.0, gt=0, description="How long one claim pins an item.")
    connect_timeout_s: float = Field(0.5, gt=0, description="How long a connection to a producer may take.")
    claim_timeout_s: float = Field(1.0, gt=0, description="How long a consumer waits for a producer's answer.")
    read_timeout_s: float = Field(5.0, gt=0, description="Deadline of one read by NIXL.")
    fetch_timeout_s: float = Field(6.0, gt=0, description="Deadline of the whole fetch of an item that is made.")
    pending_timeout_s: float = Field(60.0, gt=0, description="Longest wait for an item that is being encoded.")
    peer_retry_s: float = Field(1.0, gt=0, description="First pause before a dead producer is asked again.")
    peer_retry_max_s: float = Field(30.0, gt=0, description="Longest such pause; each failure doubles it.")
    on_failure: Literal["encode", "fail"] = Field(
        "encode", description="What becomes of an item that did not arrive: encoded locally, or its request fails."
    )
    host: str | None = Field(
        None,
        description=f"Address items are claimed at, told to others. Default: {', '.join(_HOST_ENVS)} or 127.0.0.1.",
    )
    port: int = Field(
        0,
        ge=0,
        lt=65536,
        description=f"Port that items are claimed at, plus the data-parallel index. Default: {PORT_ENV}, or 0 for a "
        "free one.",
    )
    verify_finite: bool = Field(True, description="Consumer: refuse NaN and infinity.")
    verify_checksum: bool = Field(True, description="Consumer: refuse bytes that are not those that were made.")
    progress_delay_us: int | None = Field(
        None,
        ge=0,
        description="Sleep of NIXL's progress thread where no traffic wakes it, microseconds; 0 spins. "
        "Default: 100000.",
    )

    @field_validator("host")
    @classmethod
    def _reachable(cls, host: str | None) -> str | None:
        if host is None:
            return None
        if not host:
            raise ValueError("an empty address; leave the key out for the default")
        try:
            wildcard = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            wildcard = False  # a name
        if wildcard:
            raise ValueError(f"others are told this address and cannot connect to {host}; name one of this host")
        return host

    @model_validator(mode="after")
    def _fitting(self) -> EpdConfig:
        for name in ("pool_bytes", "host_pool_bytes"):
            size = getattr(self, name)
            if 0 < size < self.block_bytes:
                raise ValueError(f"{name} is smaller than block_bytes ({self.block_bytes})")
            if size // self.block_bytes > MAX_BLOCKS:
                least = -(-size // MAX_BLOCKS)
                raise ValueError(f"{name} has more than {MAX_BLOCKS} blocks; raise block_bytes to at least {least}")
        if self.read_timeout_s > self.hold_s:
            raise ValueError("read_timeout_s must not exceed hold_s: a read may use its item only while it is pinned")
        if self.claim_timeout_s >= self.fetch_timeout_s:
            raise ValueError("claim_timeout_s must be shorter than fetch_timeout_s")
        if self.peer_retry_s > self.peer_retry_max_s:
            raise ValueError("peer_retry_s must not exceed peer_retry_max_s")
        return self

    def address(self, data_parallel_index: int = 0) -> tuple[str, int]:
        """Host and port of the item server of one data-parallel engine; port 0 takes a free one.

        Raises:
            ConfigError: the port does not exist.
        """
        port = self.port + data_parallel_index if self.port else 0
        if port > 65535:
            raise ConfigError(f"suite.port {self.port}: engine {data_parallel_index} would need port {port}")
        return self.host or "127.0.0.1", port

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any], env: Mapping[str, str] | None = None) -> EpdConfig:
        """Read and check ``ec_connector_extra_config``; what it leaves out of the address comes from ``env``.

        Raises:
            ConfigError: an unknown key or a wrong value.
        """
        env = os.environ if env is None else env
        unknown = sorted(set(extra) - {"suite"})
        if unknown:
            raise ConfigError(f"ec_connector_extra_config: unknown key {unknown[0]!r}; settings go inside 'suite'")
        given = extra.get("suite")
        if not isinstance(given, Mapping | None):
            raise ConfigError("ec_connector_extra_config.suite: must be an object of settings")
        settings = dict(given or {})
        if settings.get("host") is None:
            settings["host"] = next((env[name] for name in _HOST_ENVS if env.get(name)), "127.0.0.1")
        if "port" not in settings and env.get(PORT_ENV):
            settings["port"] = env[PORT_ENV]
        return checked(cls, settings, "ec_connector_extra_config.suite")
