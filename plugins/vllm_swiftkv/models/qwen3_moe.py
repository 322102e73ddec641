"""Qwen3 mixture of experts."""

from __future__ import annotations

import re

from torch import nn

from vllm_suite.compat.models import Qwen3MoeDecoderLayer, Qwen3MoeMLP, Qwen3MoeSparseMoeBlock, VllmConfig
from vllm_swiftkv.families import of_model_type
from vllm_swiftkv.models.base import SwiftKVForCausalLM


class Qwen3MoeSwiftKVForCausalLM(SwiftKVForCausalLM):
    """Qwen3-MoE; layers in ``mlp_only_layers`` or off the ``decoder_sparse_step`` are dense."""

    family = of_model_type("qwen3_moe")

    @staticmethod
    def make_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return Qwen3MoeDecoderLayer(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def make_mlp(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        config = vllm_config.model_config.hf_config
        found = re.search(r"layers\.(\d+)", prefix)
        layer = int(found[1]) if found else 0
        dense = layer in (getattr(config, "mlp_only_layers", None) or ())
        if not dense and config.num_experts > 0 and (layer + 1) % config.decoder_sparse_step == 0:
            return Qwen3MoeSparseMoeBlock(vllm_config=vllm_config, prefix=prefix)
        return Qwen3MoeMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
