"""Checkpoints as they come: what published ones carry beside the model, and what broken ones lack."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swiftkv_engine as se
import torch
from safetensors.torch import load_file, save_file
from swiftkv_checkpoints import make_swiftkv_checkpoint
from swiftkv_engine import Ask, tokens

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
ASKS = [Ask(tokens(70), max_tokens=6), Ask(tokens(9), max_tokens=6)]


def rewrite(path: Path, change: Change) -> Path:
    """Change a checkpoint's config and tensors in place."""
    config = json.loads((path / "config.json").read_text())
    weights = load_file(path / "model.safetensors")
    change(config, weights)
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def parameters(llm: Any) -> dict[str, int]:
    """Size of every parameter. On CPU vLLM packs what linear layers hold, so theirs come from their shapes."""
    sizes: dict[str, int] = {}
    for name, module in se.runner(llm).model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            packed = own == "weight" and hasattr(module, "output_size_per_partition")
            if packed:
                sizes[f"{name}.{own}"] = module.input_size_per_partition * module.output_size_per_partition
            else:
                sizes[f"{name}.{own}"] = parameter.numel()
    return sizes


def as_published(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    del config["key_value_group_size"]
    config["swiftkv"] = True
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    for name in weights:
        if re.search(r"layers\.[4567]\.self_attn\.[qkv]_proj\.", name):
            weights[name].fill_(float("nan"))


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_published_layout(tmp_path: Path, family: str) -> None:
    """The teacher's q, k and v of late layers take no memory, and no group size means groups of one."""
    model = make_swiftkv_checkpoint(tmp_path / "m", family, group=1, keep_teacher=True)
    rewrite(model, as_published)
    with se.engine(model) as engine:
        report = engine.run(ASKS)
        sizes = engine.call(parameters)
    se.compare(model, ASKS, report)
    se.skipped_exactly(report)
    held = load_file(model / "model.safetensors")
    dead = ("rotary_emb", *(f"layers.{i}.self_attn.{x}_proj." for i in range(4, 8) for x in "qkv"))
    assert sum(sizes.values()) == sum(t.numel() for n, t in held.items() if not any(d in n for d in dead))


def without(*names: str) -> Change:
    def change(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        for name in names:
            del weights[name]

    return change


def narrower(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.5.self_attn.k_proj_swiftkv.weight"
    weights[name] = weights[name][:32].clone()


def biased(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """As of a Qwen3 with ``attention_bias``: transformers adds it, vLLM's layer has no place for it."""
    weights["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(128)  # as quantized checkpoints have them
    weights["model.layers.2.self_attn.o_proj.bias"] = torch.full((128,), 0.1)


def setting(**fields: Any) -> Change:
    return lambda config, weights: config.update(fields)


LATE = "model.layers.5.self_attn.{}_swiftkv.{}"
BROKEN: list[tuple[str, str, Change, tuple[str, ...]]] = [
    ("no late K", "llama", without(LATE.format("k_proj", "weight")), ("lacks", LATE.format("k_proj", "weight"))),
    ("no late bias", "qwen2", without(LATE.format("v_proj", "bias")), ("lacks", LATE.format("v_proj", "bias"))),
    ("no late Q", "llama", without(LATE.format("q_proj", "weight")), ("lacks", "layers.5.self_attn.swiftkv_q_proj")),
    ("no K norm", "qwen3", without("model.layers.5.self_attn.k_norm.weight"), ("lacks", "layers.5.self_attn.k_norm")),
    ("no norm", "llama", without("model.norm_swiftkv.weight"), ("lacks", "model.norm_swiftkv.weight")),
    ("no up", "llama", without("model.layers.6.mlp.up_proj.weight"), ("lacks", "model.layers.6.mlp.up_proj.weight")),
    ("no head", "llama", without("lm_head.weight"), ("lacks", "lm_head.weight")),
    ("narrow late K", "llama", narrower, ("shape",)),
    ("other group", "llama", setting(key_value_group_size=2), ("key_value_group_size 2", "k_proj_swiftkv")),
    ("group that does not divide", "llama", setting(key_value_group_size=3), ("key_value_group_size 3",)),
    ("earlier cut", "llama", setting(num_key_value_layers=3), ("lacks", "layers.3.self_attn.")),
    ("later cut", "llama", setting(num_key_value_layers=5), ("layers.4.self_attn",)),
    ("no cut", "llama", setting(num_key_value_layers=None), ("num_key_value_layers",)),
    ("bias without a place", "qwen3", biased, ("layers.2.self_attn.o_proj.bias", "no such bias")),
    ("cut past the end", "llama", setting(num_key_value_layers=8), ("num_key_value_layers",)),
]


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        pytest.param(family, change, said, id=name, marks=() if i in (0, 5, 8, 13) else pytest.mark.slow)
        for i, (name, family, change, said) in enumerate(BROKEN)
    ],
)
def test_broken_checkpoints_are_named(tmp_path: Path, family: str, change: Change, said: tuple[str, ...]) -> None:
    model = rewrite(make_swiftkv_checkpoint(tmp_path / "m", family, group=1), change)
    error = se.refusal(model)
    for part in said:
        assert part in error.text
