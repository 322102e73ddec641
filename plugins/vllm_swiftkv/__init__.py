"""SwiftKV (arXiv 2410.03960): model classes for vLLM whose prompt tokens skip the later layers, and the tools that
make checkpoints for them.

vLLM finds the model classes here by architecture; each is imported from :mod:`vllm_swiftkv.models` on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "LlamaSwiftKVForCausalLM": "llama",
    "MistralSwiftKVForCausalLM": "llama",
    "Qwen2SwiftKVForCausalLM": "qwen2",
    "Qwen3SwiftKVForCausalLM": "qwen3",
    "Qwen3MoeSwiftKVForCausalLM": "qwen3_moe",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.models.{module}"), name)
