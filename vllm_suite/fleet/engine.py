"""The `engine:` section of a fleet file: vLLM flags by their own names."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from vllm_suite.fleet.units import Bytes

# Flags that `up` sets for each instance itself; a free argument must not contradict it.
OWNED_FLAGS = ("--model", "--host", "--port", "--served-model-name", "--plugins", "--api-key", "--uds")

PositiveInt = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of every section: frozen, and a key that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSpec(Settings):
    """Documented `vllm serve` flags. A key that is left out is not passed: vLLM's own default applies.

    A pool's section overrides the shared one key by key; `args` of both are passed, the shared ones first.
    """

    tensor_parallel_size: PositiveInt | None = Field(default=None, description="GPUs that share each layer")
    pipeline_parallel_size: PositiveInt | None = Field(default=None, description="GPUs that share the layers")
    data_parallel_size: PositiveInt | None = Field(default=None, description="engine replicas per instance")
    dtype: Literal["auto", "float32", "float16", "bfloat16", "half", "float"] | None = Field(
        default=None, description="of weights and activations"
    )
    quantization: str | None = Field(default=None, description="method of the checkpoint")
    load_format: str | None = Field(default=None, description="how the checkpoint is read")
    revision: str | None = Field(default=None, description="branch, tag or commit of the model")
    tokenizer: str | None = Field(default=None, description="where it is not beside the model")
    trust_remote_code: bool | None = Field(default=None, description="run code that comes with the model")
    max_model_len: PositiveInt | None = Field(default=None, description="tokens, prompt and output together")
    max_num_seqs: PositiveInt | None = Field(default=None, description="requests in one step")
    max_num_batched_tokens: PositiveInt | None = Field(default=None, description="tokens in one step")
    block_size: PositiveInt | None = Field(default=None, description="tokens per KV block")
    kv_cache_memory_bytes: Bytes | None = Field(
        default=None, description="bytes of KV cache per worker, for example 2GiB"
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="fraction of the GPU's memory"
    )
    kv_cache_dtype: str | None = Field(default=None, description="of the KV cache")
    enforce_eager: bool | None = Field(default=None, description="no compilation, no CUDA graphs")
    enable_prefix_caching: bool | None = Field(default=None, description="keep KV blocks of earlier prompts")
    enable_chunked_prefill: bool | None = Field(default=None, description="split long prompts over steps")
    async_scheduling: bool | None = Field(default=None, description="schedule one step ahead")
    generation_config: str | None = Field(default=None, description="`vllm` ignores the model's own")
    chat_template: str | None = Field(default=None, description="file or text")
    seed: int | None = Field(default=None, description="of the engine")
    kv_transfer_config: dict[str, Any] | None = Field(
        default=None, description="in place of the one that the disagg plugin sets"
    )
    ec_transfer_config: dict[str, Any] | None = Field(
        default=None, description="in place of the one that the epd plugin sets"
    )
    ec_manager_config: dict[str, Any] | None = Field(
        default=None, description="in place of the one that the epd plugin sets"
    )
    limit_mm_per_prompt: dict[str, Any] | None = Field(
        default=None, description="images, videos and audio clips of one request, for example {image: 16}"
    )
    mm_processor_kwargs: dict[str, Any] | None = Field(default=None, description="of the model's media processor")
    additional_config: dict[str, Any] | None = Field(default=None, description="read by plugins")
    args: tuple[str, ...] = Field(default=(), description="any other flags, as on the command line")

    @field_validator("args")
    @classmethod
    def _not_owned(cls, args: tuple[str, ...]) -> tuple[str, ...]:
        for arg in args:
            flag = arg.split("=", 1)[0].replace("_", "-")
            if flag in OWNED_FLAGS:
                raise ValueError(f"{flag} is set for each instance; it cannot be a free argument")
        return args

    def overridden_by(self, other: EngineSpec) -> EngineSpec:
        """This section with the keys that `other` sets put over it."""
        values = {name: getattr(other, name) for name in other.model_fields_set if name != "args"}
        return self.model_copy(update={**values, "args": self.args + other.args})

    @property
    def gpus(self) -> int:
        """GPUs that one instance takes."""
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size)
        product = 1
        for size in sizes:
            product *= size or 1
        return product

    def flags(self) -> list[str]:
        """The section as command-line words."""
        words: list[str] = []
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name == "args" or value is None:
                continue
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else "--no-" + flag[2:])
            elif isinstance(value, dict):
                words += [flag, json.dumps(value, separators=(",", ":"))]
            else:
                words += [flag, str(value)]
        return [*words, *self.args]
