"""Llama, and Mistral where its architecture is Llama's."""

from __future__ import annotations

from torch import nn

from vllm_suite.compat.models import LlamaDecoderLayer, LlamaMLP, VllmConfig
from vllm_swiftkv.families import of_model_type
from vllm_swiftkv.models.base import SwiftKVForCausalLM


class LlamaSwiftKVForCausalLM(SwiftKVForCausalLM):
    """Llama 2, 3 and their kin."""

    family = of_model_type("llama")

    @staticmethod
    def make_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return LlamaDecoderLayer(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def make_mlp(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config = vllm_config.model_config.hf_config
        return LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=getattr(config, "mlp_bias", False),
            prefix=prefix,
        )


class MistralSwiftKVForCausalLM(LlamaSwiftKVForCausalLM):
    """Mistral without a sliding window."""

    family = of_model_type("mistral")
