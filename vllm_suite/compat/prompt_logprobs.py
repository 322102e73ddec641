"""Refuse ``prompt_logprobs: 0`` where prompt tokens skip layers, as vLLM refuses every other value."""

from __future__ import annotations

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

# ### PATCH START: InputProcessor._validate_params
# Why: under --kv-sharing-fast-prefill vLLM answers a request for prompt log-probabilities with status 400, but its
# check takes 0 ("that of the prompt's own tokens") for "not asked". Such a request, or a completion with
# {"echo": true, "logprobs": 0}, then ends the engine (the first model runner asserts) or gets wrong numbers (the
# second). A logits processor could refuse it too, but cannot be combined with speculative decoding.
# The signature is unchanged and the upstream method runs first.
# Remove when: AsyncLLM.add_request tests `prompt_logprobs is not None`.
_upstream_validate = InputProcessor._validate_params


def _validate_params(self: Any, params: Any, supported_tasks: Any) -> bool | None:
    watermarking: bool | None = _upstream_validate(self, params, supported_tasks)
    asked = getattr(params, "prompt_logprobs", None) is not None
    if asked and self.vllm_config.cache_config.kv_sharing_fast_prefill:
        raise VLLMValidationError(
            "--kv-sharing-fast-prefill leaves prompt tokens without logprobs; start the instance with "
            "--no-kv-sharing-fast-prefill where requests need them",
            parameter="prompt_logprobs",
        )
    return watermarking


def install() -> None:
    """Put the patch in place; a second call changes nothing."""
    InputProcessor._validate_params = _validate_params


# ### PATCH END
