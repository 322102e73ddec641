"""Small checkpoints for the tests of merging, and the same merge done in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def write(folder: Path, tensors: Mapping[str, torch.Tensor], files: int = 1, **config: Any) -> Path:
    """A checkpoint with its tensors spread over so many files."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    names = list(tensors)
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(files):
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::files]}, folder / file)
        weight_map |= dict.fromkeys(names[i::files], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read(folder: Path) -> Tensors:
    """Every tensor of a checkpoint."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def reference(base: Tensors, tuned: Tensors, keep: float, scale: float, scope: str, dtype: str = "base") -> Tensors:
    """base + scale * the largest updates: sorted in memory, stably, in the order of name and index."""
    names = sorted(base)
    updates = {name: (tuned[name].float() - base[name].float()).flatten() for name in names}
    groups = [names] if scope == "global" else [[name] for name in names]
    merged = {}
    for group in groups:
        every = torch.cat([updates[name] for name in group])
        k = max(1, int(Fraction(str(keep)) * len(every)))
        chosen = torch.zeros(len(every), dtype=torch.bool)
        chosen[torch.sort(every.abs(), descending=True, stable=True).indices[:k]] = True
        chosen &= every != 0
        for name, mask in zip(group, chosen.split([len(updates[name]) for name in group]), strict=True):
            old = base[name].float().flatten()
            new = torch.where(mask, old + torch.tensor(scale, dtype=torch.float32) * updates[name], old)
            merged[name] = new.to((base if dtype == "base" else tuned)[name].dtype).reshape(base[name].shape)
    return merged


def equal(one: Tensors, other: Tensors) -> bool:
    """Bit for bit, names, dtypes and shapes included."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and bytes(one[name].contiguous().flatten().view(torch.uint8).numpy())
        == bytes(other[name].contiguous().flatten().view(torch.uint8).numpy())
        for name in one
    )
