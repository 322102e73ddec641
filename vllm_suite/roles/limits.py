"""The engine's limits of each role, as the fleet's file has them and the environment carries them to the instances."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_suite.identity import Role

ENV_LIMITS = "VLLM_SUITE_ROLE_LIMITS"
"""JSON of `RoleLimits`."""


class Limits(BaseModel):
    """Of one role; what is left out stays as the engine was started. None may exceed that."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_num_batched_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens of one step: many for prefill, few beside decode"
    )
    max_num_seqs: Annotated[int, Field(ge=1)] | None = Field(default=None, description="requests that run together")
    long_prefill_token_threshold: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="prompt tokens of one request in one step; 0: no such limit"
    )


class RoleLimits(BaseModel):
    """By role. A role that is left out runs with what the engine was started with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encode: Limits = Field(default=Limits(), description="instances that encode")
    prefill: Limits = Field(default=Limits(), description="instances that prefill")
    decode: Limits = Field(default=Limits(), description="instances that decode")
    any: Limits = Field(default=Limits(), description="instances that do all of it")

    def of(self, role: Role) -> dict[str, int]:
        """What differs from the start."""
        limits: Limits = getattr(self, role)
        return limits.model_dump(exclude_none=True)


def parse(text: str) -> RoleLimits:
    """From the environment. Raises ValueError with what is wrong."""
    try:
        return RoleLimits.model_validate_json(text or "{}", strict=True)
    except ValidationError as error:
        raise ValueError(f"{ENV_LIMITS}: {error}") from error
