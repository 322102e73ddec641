"""Shapes of models, and what SwiftKV can save at most: the FLOPs of a prompt token, layer by layer.

shared/reference/swiftkv.md, section 1.4. No torch, no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder.

    Attributes:
        tp: tensor-parallel size it is meant for.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tp: int = 1

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 1:
            raise ValueError(f"every size of a shape is at least 1: {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")

    @property
    def parameters(self) -> int:
        """Number of weights of the ordinary model; norms are left out."""
        width, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = 2 * self.hidden * (width + kv) + 3 * self.hidden * self.intermediate
        return self.layers * layer + 2 * self.vocab * self.hidden

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token has in the KV caches of all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def hf_config(self, dtype: str, max_position: int, cut: int | None = None, group: int = 1) -> dict[str, Any]:
        """``config.json`` of the ordinary Llama, or with ``cut`` of its SwiftKV form."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": max_position,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "dtype": dtype,
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        if cut is not None:
            config |= {"architectures": ["LlamaSwiftKVForCausalLM"], "model_type": "llama_swiftkv"}
            config |= {"num_key_value_layers": cut, "key_value_group_size": group}
        return config


PRESETS = {
    # Sixteen layers of GPT-2's width with one K/V head for three of queries: compute decides even on two cores.
    "125m": Shape(16, 768, 2304, 12, 4, 64, 8192),
    "1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "70b-tp4": Shape(80, 8192, 28672, 64, 8, 128, 128256, tp=4),
}


@dataclass(frozen=True)
class LayerFlops:
    """FLOPs of one layer per prompt token.

    Attributes:
        qo: q and o projections. kv: k and v projections. mlp: the MLP. attention: scores and values, averaged over
            the prompt's tokens.
    """

    qo: float
    kv: float
    mlp: float
    attention: float

    @property
    def total(self) -> float:
        return self.qo + self.kv + self.mlp + self.attention


def layer_flops(shape: Shape, tokens: int, cached: int = 0) -> LayerFlops:
    """One layer's FLOPs per token of a causal prompt of ``tokens`` after ``cached`` tokens with K/V."""
    width, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return LayerFlops(
        qo=4.0 * shape.hidden * width,
        kv=4.0 * shape.hidden * kv,
        mlp=6.0 * shape.hidden * shape.intermediate,
        attention=2.0 * width * tokens + 4.0 * width * cached,
    )


def bound(shape: Shape, tokens: int, cut: int, group: int = 1, cached: int = 0) -> float:
    """Largest possible prefill speed-up: ``1 / (1 - s * (1 - KV / (g * F)))`` with ``s = (L - cut) / L``.

    Args:
        cut: layers that every prompt token runs.
        group: tail layers that share one K and V (AcrossKV).

    Raises:
        ValueError: a cut outside the model, or a group that does not divide the tail.
    """
    tail = shape.layers - cut
    if not 0 < cut < shape.layers:
        raise ValueError(f"the cut must lie between 1 and {shape.layers - 1}, not {cut}")
    if group < 1 or tail % group:
        raise ValueError(f"groups of {group} do not divide the {tail} layers after the cut")
    flops = layer_flops(shape, tokens, cached)
    return 1 / (1 - tail / shape.layers * (1 - flops.kv / (group * flops.total)))
