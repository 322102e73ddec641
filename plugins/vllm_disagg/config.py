"""Settings of the connector: the ``suite`` object inside ``kv_connector_extra_config``.

Example::

    --kv-transfer-config '{"kv_connector": "SuiteNixlConnector", "kv_role": "kv_producer",
                           "kv_connector_extra_config": {"suite": {"lease_s": 20}}}'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_suite.plugin_config import ConfigError as ConfigError
from vllm_suite.plugin_config import checked

# Keys vLLM's own NIXL connector reads from the same dictionary.
UPSTREAM_KEYS = frozenset(
    {
        "backends",
        "bidirectional_kv_xfer",
        "decoder_kv_blocks_ttl",
        "enforce_handshake_compat",
        "engine_ttl",
        "kv_lease_duration",
        "kv_recompute_threshold",
        "num_threads",
        "push_registration_timeout",
    }
)


class DisaggConfig(BaseModel):
    """How references are leased, claimed and pulled. Times are seconds.

    The order ``claim_timeout_s < pull_timeout_s`` is checked; the hold that a consumer asks of a producer is
    derived from them (see :attr:`hold_s`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    lease_s: float = Field(15.0, gt=0, description="How long a producer keeps blocks nobody has claimed.")
    claim_timeout_s: float = Field(1.0, gt=0, description="How long a consumer waits for a producer's answer.")
    pull_timeout_s: float = Field(10.0, gt=0, description="Deadline of one pull, handshake included.")
    max_hold_s: float = Field(600.0, gt=0, description="A lease ends after this long, renewed or not.")
    peer_retry_s: float = Field(2.0, gt=0, description="First pause before a dead producer is asked again.")
    peer_retry_max_s: float = Field(60.0, gt=0, description="Longest such pause; each failure doubles it.")
    lease_host: str | None = Field(
        None, description="Address leases are claimed at; default: the NIXL side channel's host."
    )
    lease_port: int = Field(0, ge=0, lt=65536, description="Port leases are claimed at; 0 takes a free one.")
    progress_delay_us: int | None = Field(
        None,
        ge=0,
        description="Sleep of NIXL's progress thread between polls, microseconds; 0 spins. "
        "Default: 10000 on the CPU platform, NIXL's own 0 elsewhere.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> DisaggConfig:
        if self.claim_timeout_s >= self.pull_timeout_s:
            raise ValueError("claim_timeout_s must be shorter than pull_timeout_s")
        if self.max_hold_s <= self.hold_s:
            raise ValueError(f"max_hold_s must exceed the hold of one claim ({self.hold_s:g} s)")
        return self

    @property
    def renew_s(self) -> float:
        """Interval between a consumer's renewals of a claim whose pull has not ended."""
        return self.pull_timeout_s / 2

    @property
    def hold_s(self) -> float:
        """What one claim or renewal asks for: a missed renewal, a whole pull, and a margin for slow clocks."""
        return 2 * self.pull_timeout_s + self.margin_s

    @property
    def margin_s(self) -> float:
        """Time between the consumer's last use of a lease and the producer's earliest release."""
        return max(0.5, self.pull_timeout_s / 5)

    @classmethod
    def from_extra_config(cls, extra: Mapping[str, Any]) -> DisaggConfig:
        """Read and check ``kv_connector_extra_config``.

        Raises:
            ConfigError: an unknown key, a wrong value, or an upstream option the fence cannot cover.
        """
        unknown = sorted(set(extra) - UPSTREAM_KEYS - {"suite"})
        if unknown:
            known = ", ".join(sorted(UPSTREAM_KEYS | {"suite"}))
            raise ConfigError(f"kv_connector_extra_config: unknown key {unknown[0]!r}; known keys: {known}")
        if extra.get("bidirectional_kv_xfer"):
            raise ConfigError(
                "kv_connector_extra_config.bidirectional_kv_xfer: reading KV back from a decode instance is not "
                "fenced by SuiteNixlConnector; remove the key, or use vLLM's NixlConnector"
            )
        settings = dict(extra.get("suite") or {})
        if "kv_lease_duration" in extra:
            settings.setdefault("lease_s", float(extra["kv_lease_duration"]))
        return checked(cls, settings, "kv_connector_extra_config.suite")
