"""Settings of the plugin: the ``swiftkv`` object inside ``--additional-config``.

Example::

    --additional-config '{"suite": {"swiftkv": {"prefill_only": true}}}'
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_suite.catalog import SelectionError
from vllm_suite.compat.additional import section
from vllm_suite.plugin_config import checked


class SwiftKVSettings(BaseModel):
    """How SwiftKV models are served. The defaults are right for an instance that answers clients."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    skip: bool | None = Field(
        None,
        description="Prompt tokens skip the later layers. False: every layer computes every token, which "
        "prompt_logprobs and log-likelihood evaluation need. Default: on unless --no-kv-sharing-fast-prefill is given.",
    )
    prefill_only: bool = Field(
        False,
        description="Load only the layers up to the cut and the late keys and values: an instance that computes "
        "prompts for others and never answers a client.",
    )
    late_kv_kernel: Literal["auto", "on", "off"] = Field(
        "auto", description="The Triton kernel that writes late keys and values; auto: where it is faster."
    )

    @model_validator(mode="after")
    def _consistent(self) -> SwiftKVSettings:
        if self.prefill_only and self.skip is False:
            raise ValueError("prefill_only leaves the later layers out; it cannot go with skip: false")
        return self

    @classmethod
    def of(cls, config: Any) -> SwiftKVSettings:
        """From vLLM's `VllmConfig` or `EngineArgs`: whatever carries ``additional_config``.

        Raises:
            SelectionError: an unknown key or a wrong value; the text names the key.
        """
        found = section(config.additional_config, "swiftkv")
        return checked(cls, found, "additional_config.suite.swiftkv", SelectionError)
