"""Qwen3, dense."""

from __future__ import annotations

from torch import nn

from vllm_suite.compat.models import Qwen3DecoderLayer, VllmConfig
from vllm_swiftkv.families import of_model_type
from vllm_swiftkv.models.qwen2 import Qwen2SwiftKVForCausalLM


class Qwen3SwiftKVForCausalLM(Qwen2SwiftKVForCausalLM):
    """Qwen3: q and k are normalised per head; the MLP is Qwen2's."""

    family = of_model_type("qwen3")

    @staticmethod
    def make_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return Qwen3DecoderLayer(
            vllm_config.model_config.hf_config, vllm_config.cache_config, vllm_config.quant_config, prefix
        )
