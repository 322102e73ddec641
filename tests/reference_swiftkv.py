"""What a SwiftKV model computes, in plain float32 torch: the anchor that engines and trainers are compared with.

Reads ``config.json`` and the safetensors files itself and shares no code with the suite, transformers or vLLM.
It is slow on purpose: the whole sequence through every layer, no cache, one line per step of the method
(arXiv 2410.03960, section 3). A checkpoint without ``num_key_value_layers`` is an ordinary model: all head, no tail.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


def load(path: Path | str) -> Reference:
    """The model in folder ``path``. Raises ValueError for one that this file does not describe."""
    config = json.loads((Path(path) / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return Reference(config, weights)


class Reference:
    """One model; ``logits`` and ``greedy`` are what tests call."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights
        kind = config["model_type"].removesuffix("_swiftkv")
        if kind not in MODEL_TYPES or config.get("quantization_config"):
            raise ValueError(f"the reference does not know {config['model_type']!r} or its quantisation")
        if config.get("sliding_window") and config.get("use_sliding_window", True):
            raise ValueError("the reference has no sliding window")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError("the reference knows the activation silu alone")
        self.layers: int = config["num_hidden_layers"]
        self.cut: int = config.get("num_key_value_layers") or self.layers
        self.group: int = config.get("key_value_group_size") or 1
        self.heads: int = config["num_attention_heads"]
        self.kv_heads: int = config["num_key_value_heads"]
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.heads

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """Next-token logits after each of ``ids``: [T, V]."""
        x = self.weights["model.embed_tokens.weight"][torch.tensor(ids)]
        turn = self.rotation(len(ids))
        late: dict[int, tuple[Tensor, Tensor]] = {}  # K and V of each leader of the tail
        for i in range(self.layers):
            at = f"model.layers.{i}.self_attn."
            if i == self.cut:
                n = self.norm("model.norm_swiftkv", x)
                for leader in range(self.cut, self.layers, self.group):
                    late[leader] = self.keys_and_values(f"model.layers.{leader}.self_attn.", "_proj_swiftkv", n, turn)
            y = self.norm(f"model.layers.{i}.input_layernorm", x)
            if i < self.cut:
                q = self.project(at + "q_proj", at + "q_norm", y)
                k, v = self.keys_and_values(at, "_proj", y, turn)
            else:
                q = self.project(at + "q_proj_swiftkv", at + "q_norm", y)
                k, v = late[i - (i - self.cut) % self.group]
            x = x + self.linear(at + "o_proj", self.attention(rotate(q, turn), k, v))
            x = x + self.mlp(i, self.norm(f"model.layers.{i}.post_attention_layernorm", x))
        head = "model.embed_tokens" if self.config.get("tie_word_embeddings") else "lm_head"
        return self.linear(head, self.norm("model.norm", x))

    def greedy(self, ids: list[int], n: int) -> list[int]:
        """The ``n`` tokens that follow ``ids``; the end-of-text token does not end them."""
        out: list[int] = []
        for _ in range(n):
            out.append(int(self.logits([*ids, *out])[-1].argmax()))
        return out

    def keys_and_values(self, at: str, proj: str, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        k = self.project(f"{at}k{proj}", at + "k_norm", x)
        return rotate(k, turn), self.linear(f"{at}v{proj}", x).unflatten(-1, (-1, self.head_dim))

    def project(self, name: str, head_norm: str, x: Tensor) -> Tensor:
        """[T, hidden] to [T, heads, head_dim], normalised per head in the families that do so."""
        y = self.linear(name, x).unflatten(-1, (-1, self.head_dim))
        return self.norm(head_norm, y) if head_norm + ".weight" in self.weights else y

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: [T, heads, head_dim] queries, [T, kv_heads, head_dim] keys and values."""
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -math.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        at = f"model.layers.{layer}.mlp."
        if at + "gate.weight" not in self.weights:
            return self.gated(at, x)
        scores = self.linear(at + "gate", x).softmax(-1)
        top, chosen = scores.topk(self.config["num_experts_per_tok"], dim=-1)
        if self.config.get("norm_topk_prob"):
            top = top / top.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for weight, expert in zip(top[token], chosen[token].tolist(), strict=True):
                out[token] += weight * self.gated(f"{at}experts.{expert}.", x[token])
        return out

    def gated(self, at: str, x: Tensor) -> Tensor:
        return self.linear(at + "down_proj", F.silu(self.linear(at + "gate_proj", x)) * self.linear(at + "up_proj", x))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights.get(name + ".bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name + ".weight"]

    def rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of RoPE, [T, 1, head_dim / 2] each."""
        rope = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        theta = rope.get("rope_theta") or self.config["rope_theta"]
        frequency = theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind == "llama3":
            frequency = llama3(frequency, rope)
        elif kind != "default":
            raise ValueError(f"the reference does not know the RoPE type {kind!r}")
        angle = torch.arange(tokens)[:, None, None] * frequency
        return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on [T, heads, head_dim]: each dimension of the first half pairs with its place in the second."""
    (cos, sin), (a, b) = turn, x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def llama3(frequency: Tensor, rope: dict[str, Any]) -> Tensor:
    """Llama 3.1's long-context frequencies: slow ones divided by the factor, fast ones kept, a ramp between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / rope["factor"]
