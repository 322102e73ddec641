"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from torch import nn

from vllm_suite.compat.models import Qwen2DecoderLayer, Qwen2MLP, VllmConfig
from vllm_swiftkv.families import of_model_type
from vllm_swiftkv.models.base import SwiftKVForCausalLM


class Qwen2SwiftKVForCausalLM(SwiftKVForCausalLM):
    """Qwen2: biases on q, k and v."""

    family = of_model_type("qwen2")

    @staticmethod
    def make_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return Qwen2DecoderLayer(
            vllm_config.model_config.hf_config, vllm_config.cache_config, vllm_config.quant_config, prefix
        )

    @staticmethod
    def make_mlp(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config = vllm_config.model_config.hf_config
        return Qwen2MLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, vllm_config.quant_config, prefix
        )
