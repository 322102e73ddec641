"""Attention of tail layers: their own queries over keys and values that the head's output gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vllm_suite.compat.models import (
    Attention,
    BaseLayerWithLoRA,
    ColumnParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VllmConfig,
)
from vllm_swiftkv.families import Family


class TailCache(nn.Module):
    """The keys and values of one group of tail layers: what a prefill-only instance keeps of the group's leader.

    Args:
        like: vLLM's attention module of a head layer; geometry and RoPE are taken from it.
        prefix: of the leader's attention module, ``model.layers.N.self_attn``.
        k_norm: with a weight that normalises the keys (a family with q/k norms).
    """

    def __init__(self, vllm_config: VllmConfig, like: Any, prefix: str, k_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(
            like.num_heads,
            like.head_dim,
            like.scaling,
            num_kv_heads=like.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )
        if k_norm:
            self.k_norm = RMSNorm(like.head_dim, eps=like.k_norm.variance_epsilon)


class TailAttention(nn.Module):
    """Queries and output projection of one tail layer.

    Args:
        like: vLLM's attention module of a head layer; geometry and RoPE are taken from it.
        cache: of this layer's group. Followers attend through the leader's own attention module. A module of their
            own would be one that shares a KV cache, and vLLM puts such layers at a model's end into an attention
            group of their own, whose metadata costs the host as much as the others' in every step.
        leads: this layer is the group's leader, under whose name the cache is registered.
        prefix: of this module, ``model.layers.N.self_attn``.
    """

    def __init__(
        self, vllm_config: VllmConfig, family: Family, like: Any, cache: TailCache, leads: bool, prefix: str
    ) -> None:
        super().__init__()
        if leads:
            self.attn = cache.attn
            if hasattr(cache, "k_norm"):
                self.k_norm = cache.k_norm
        # In a tuple: a module is registered once, under its leader's name.
        self._attend = (cache.attn,)
        config = vllm_config.model_config.hf_config
        width = like.total_num_heads * like.head_dim
        # The attribute has another name than the checkpoint's tensor: vLLM's loader reads every `.q_proj` as a
        # part of a fused qkv projection. Quantization looks at the prefix, which is the checkpoint's.
        self.swiftkv_q_proj = ColumnParallelLinear(
            config.hidden_size,
            width,
            bias=family.has_qkv_bias(config),
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.q_proj_swiftkv",
        )
        self.o_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=getattr(like.o_proj, "bias", None) is not None,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = like.rotary_emb
        self.head_dim = like.head_dim
        self.q_norm = RMSNorm(like.head_dim, eps=like.q_norm.variance_epsilon) if family.qk_norm else None

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """``positions`` [rows], ``hidden_states`` [rows, hidden] -> [rows, hidden]."""
        q, _ = self.swiftkv_q_proj(hidden_states)
        if self.q_norm is not None:
            q = self.q_norm(q.view(*q.shape[:-1], -1, self.head_dim)).view(q.shape)
        q, _ = self.rotary_emb(positions, q, None)
        # No key and value: they are in the cache already.
        output, _ = self.o_proj(self._attend[0](q, None, None))
        return output


class TailLayer(nn.Module):
    """One decoder layer after the cut."""

    def __init__(self, self_attn: TailAttention, mlp: nn.Module, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.mlp = mlp
        self.input_layernorm = RMSNorm(hidden_size, eps=eps)
        self.post_attention_layernorm = RMSNorm(hidden_size, eps=eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pre-norm block; returns the MLP's output and the residual stream before it."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


class CacheOnlyLayer(nn.Module):
    """What a prefill-only instance keeps of a tail layer that owns a cache."""

    def __init__(self, self_attn: TailCache) -> None:
        super().__init__()
        self.self_attn = self_attn


def leave_lora_out(module: nn.Module) -> None:
    """Put back the layers inside ``module`` that vLLM's LoRA has wrapped.

    It wraps all linear layers, whether an adapter names them or not, and a wrapped one maps rows to adapters by the
    rows of the whole step, which those of the tail are not.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseLayerWithLoRA):
                setattr(parent, name, child.base_layer)
