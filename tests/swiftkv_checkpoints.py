"""Random SwiftKV checkpoints of every family, as small as an engine takes them.

The weights are drawn so that what a test compares means something: norms differ from one another, no tensor is a
copy of another, each layer changes the stream, attention looks at few tokens, and the logits are far apart. Equal
arguments give equal files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_tokenizer

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}


def make_swiftkv_checkpoint(
    path: Path,
    family: str,
    layers: int = 8,
    cut: int = 4,
    group: int = 1,
    seed: int = 0,
    *,
    keep_teacher: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write a random SwiftKV checkpoint with its tokenizer into ``path`` and return it.

    Args:
        family: a key of ``FAMILIES``.
        layers, cut, group: number of layers, of those that own ordinary K/V, and of tail layers per K/V.
        keep_teacher: write the tail's ordinary q, k and v too, as checkpoints trained elsewhere carry them; they are
            random and must have no effect.
        config: fields of ``config.json`` that replace the defaults, for instance ``attention_bias=True``.
    """
    full = _config(family, layers, cut, group, dtype) | config
    shapes = _shapes(family, full, keep_teacher)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(full, indent=2, sort_keys=True) + "\n")
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    (path / "generation_config.json").write_text(json.dumps(generation) + "\n")
    write_tokenizer(path, model_max_length=full["max_position_embeddings"])
    weights = {name: _draw(name, shape, seed).to(dtype) for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _config(family: str, layers: int, cut: int, group: int, dtype: torch.dtype) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family] + "SwiftKVForCausalLM"],
        "model_type": family + "_swiftkv",
        "num_hidden_layers": layers,
        "num_key_value_layers": cut,
        "key_value_group_size": group,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,  # the smallest that vLLM's attention on CPU takes
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "use_cache": True,
    }
    if family == "qwen3_moe":
        config |= {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    return config


def _shapes(family: str, config: dict[str, Any], keep_teacher: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    sizes = {"q": config["num_attention_heads"] * head_dim}
    sizes |= {"k": config["num_key_value_heads"] * head_dim, "v": config["num_key_value_heads"] * head_dim}
    bias = family == "qwen2" or (family != "mistral" and config["attention_bias"])
    cut, group = config["num_key_value_layers"], config["key_value_group_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        layer, leads = f"model.layers.{i}.", i < cut or (i - cut) % group == 0
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (hidden,)
        own = [] if i < cut else ["q_proj_swiftkv"] + (["k_proj_swiftkv", "v_proj_swiftkv"] if leads else [])
        if i < cut or keep_teacher:
            own += ["q_proj", "k_proj", "v_proj"]
        for name in own:
            shapes[f"{layer}self_attn.{name}.weight"] = (sizes[name[0]], hidden)
            if bias:
                shapes[f"{layer}self_attn.{name}.bias"] = (sizes[name[0]],)
        shapes[f"{layer}self_attn.o_proj.weight"] = (hidden, sizes["q"])
        if bias and family != "qwen2":
            shapes[f"{layer}self_attn.o_proj.bias"] = (hidden,)
        if family.startswith("qwen3"):
            shapes[f"{layer}self_attn.q_norm.weight"] = (head_dim,)
            if leads or keep_teacher:
                shapes[f"{layer}self_attn.k_norm.weight"] = (head_dim,)
        if family == "qwen3_moe" and i not in config["mlp_only_layers"]:
            shapes[f"{layer}mlp.gate.weight"] = (config["num_experts"], hidden)
            blocks = {f"{layer}mlp.experts.{e}.": config["moe_intermediate_size"] for e in range(config["num_experts"])}
        else:
            blocks = {f"{layer}mlp.": inner}
        for at, width in blocks.items():
            shapes |= {f"{at}gate_proj.weight": (width, hidden), f"{at}up_proj.weight": (width, hidden)}
            shapes[f"{at}down_proj.weight"] = (hidden, width)
    shapes |= {"model.norm.weight": (hidden,), "model.norm_swiftkv.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """One stream per tensor, so that a tensor does not depend on which others are drawn."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7]))
    values = torch.randn(shape, generator=generator)
    if name.endswith(".bias"):
        return values * 0.1
    if len(shape) == 1:
        return 1 + values * 0.2  # a norm
    values /= shape[1] ** 0.5
    if "embed_tokens" in name:
        return values * shape[1] ** 0.5 * 0.3
    if "mlp.gate.weight" in name:
        return values * 2  # experts are far apart, so that rounding never changes which are chosen
    if any(part in name for part in ("q_proj", "k_proj")):
        return values * 1.7  # scores with a spread of about 3: attention picks
    return values * (3 if "lm_head" in name else 1)
