"""The tensors of an ordinary checkpoint of each family, from its config: what must be there, and in which shape.

Names and shapes are those that transformers saves; a test compares them for every family.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from vllm_suite.checkpoints.source import Source, Tensor
from vllm_swiftkv.convert.errors import ConvertError
from vllm_swiftkv.families import Family, of_model_type

Shapes = dict[str, tuple[int, ...]]

# Beside a quantised linear layer's weight.
_SCALES = frozenset({"weight_scale", "input_scale"})
# Scales of a quantised KV cache, in the three spellings in use.
KV_SCALES = re.compile(
    r"self_attn\.(?:(k)_proj\.(?:k_scale|output_scale)|(v)_proj\.(?:v_scale|output_scale)|([qkv])_scale)$"
)
# Buffers that old checkpoints carry; every library computes them itself.
_DEAD = re.compile(r"rotary_emb\.inv_freq$")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")
_LINEAR_BIAS_ON_O = frozenset({"llama", "qwen3", "qwen3_moe"})


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of an ordinary config. Raises SwiftKVError for any other model, SwiftKV ones included."""
    model_type, architectures = str(config.get("model_type")), config.get("architectures")
    family = of_model_type(model_type)
    if model_type == family.model_type:
        raise ConvertError(f"model_type {model_type}: this is a SwiftKV checkpoint already")
    if architectures != [family.base_architecture]:
        raise ConvertError(f"architectures is {architectures}; only {family.base_architecture} can be converted")
    return family


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of the config. Raises ConvertError where it is missing and has no default."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConvertError(f"config.json: {key} is {value!r}; a positive integer is expected")
    return value


def expected(config: Mapping[str, Any], family: Family) -> Shapes:
    """Every tensor that the ordinary model must have."""
    hidden, vocab = integer(config, "hidden_size"), integer(config, "vocab_size")
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocab, hidden)
    for i in range(integer(config, "num_hidden_layers")):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            **_attention(config, family, hidden),
            **(_experts(config, hidden) if _sparse(config, family, i) else _mlp(config, family, hidden)),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _attention(config: Mapping[str, Any], family: Family, hidden: int) -> Shapes:
    heads = integer(config, "num_attention_heads")
    kv_heads = integer(config, "num_key_value_heads", heads)
    head_dim = integer(config, "head_dim", hidden // heads)
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    shapes: Shapes = {f"self_attn.{x}_proj.weight": (n, hidden) for x, n in rows.items()}
    shapes["self_attn.o_proj.weight"] = (hidden, rows["q"])
    if family.has_qkv_bias(SimpleNamespace(**config)):
        shapes |= {f"self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    if config.get("attention_bias") and family.base_model_type in _LINEAR_BIAS_ON_O:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if family.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    return shapes


def _mlp(config: Mapping[str, Any], family: Family, hidden: int) -> Shapes:
    inner = integer(config, "intermediate_size")
    rows = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    shapes: Shapes = {f"mlp.{x}_proj.weight": shape for x, shape in rows.items()}
    if config.get("mlp_bias") and family.base_model_type == "llama":
        shapes |= {f"mlp.{x}_proj.bias": shape[:1] for x, shape in rows.items()}
    return shapes


def _sparse(config: Mapping[str, Any], family: Family, layer: int) -> bool:
    """Whether a layer's MLP is a mixture of experts (transformers, Qwen3MoeDecoderLayer)."""
    if not family.moe or layer in (config.get("mlp_only_layers") or ()):
        return False
    return (layer + 1) % integer(config, "decoder_sparse_step", 1) == 0


def _experts(config: Mapping[str, Any], hidden: int) -> Shapes:
    # transformers 4 and the published checkpoints write num_experts, transformers 5 num_local_experts.
    key = "num_experts" if config.get("num_experts") is not None else "num_local_experts"
    experts, inner = integer(config, key), integer(config, "moe_intermediate_size")
    shapes: Shapes = {"mlp.gate.weight": (experts, hidden)}
    for e in range(experts):
        shapes[f"mlp.experts.{e}.gate_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{e}.up_proj.weight"] = (inner, hidden)
        shapes[f"mlp.experts.{e}.down_proj.weight"] = (hidden, inner)
    return shapes


def checked(source: Source, family: Family, quantized: bool) -> dict[str, Tensor]:
    """The checkpoint's tensors without dead ones, once names and shapes are right. Raises ConvertError otherwise."""
    shapes = expected(source.config, family)
    missing = [name for name in shapes if name not in source.tensors]
    if missing:
        raise ConvertError(f"{source.folder} lacks {_some(missing)}")
    for name, shape in shapes.items():
        if source.tensors[name].shape != shape:
            found = list(source.tensors[name].shape)
            raise ConvertError(f"{source.folder}: {name} has shape {found}; config.json asks for {list(shape)}")
    tensors = {name: tensor for name, tensor in source.tensors.items() if not _DEAD.search(name)}
    stray = [n for n, t in tensors.items() if n not in shapes and not _may_be(n, t, shapes, quantized)]
    if stray:
        raise ConvertError(f"{source.folder} has what a {family.base_model_type} model does not: {_some(stray)}")
    return tensors


def _may_be(name: str, tensor: Tensor, shapes: Shapes, quantized: bool) -> bool:
    """Whether a tensor beyond the expected ones is a scale, or the head that tied embeddings make superfluous."""
    if name == "lm_head.weight":
        return tensor.shape == shapes["model.embed_tokens.weight"]
    if not quantized:
        return False
    module, _, leaf = name.rpartition(".")
    weight = shapes.get(f"{module}.weight", ())
    if leaf in _SCALES and len(weight) == 2:
        rows = weight[0] if leaf == "weight_scale" else 1
        if math.prod(tensor.shape) not in (1, rows):
            raise ConvertError(
                f"{name} has shape {list(tensor.shape)}; one scale per tensor or per output channel is supported"
            )
        return True
    layer = LAYER.match(name)
    return bool(layer and KV_SCALES.match(layer[2]) and f"model.layers.{layer[1]}.self_attn.o_proj.weight" in shapes)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
