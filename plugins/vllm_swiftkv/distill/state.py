"""Checkpoints of a distillation: what trains, its optimizer and where the run is. The frozen weights stay out.

A checkpoint is a folder that appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from vllm_swiftkv.families import SwiftKVError

_FULL = {"full_state_dict": True, "cpu_offload": True, "ignore_frozen_params": True}


def save_state(
    folder: Path, student: Any, optimizer: Any, state: dict[str, Any], *, main: bool, keep: int
) -> Path | None:
    """Write the checkpoint of ``state["step"]`` into ``folder`` and delete all but the newest ``keep``.

    Every process calls it (sharded weights are gathered); the one with ``main`` writes and gets the path.
    """
    weights, moments = get_state_dict(student, optimizer, options=StateDictOptions(**_FULL))
    if not main:
        return None
    target = folder / f"step-{state['step']:08d}"
    partial = folder / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, partial / "trained.safetensors")
    random = {"torch": torch.get_rng_state()}
    torch.save({"optimizer": moments, "random": random}, partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps(state, indent=2))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    _sync(folder)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-????????"))


def read_state(checkpoint: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Where a checkpoint is. Raises SwiftKVError where it belongs to a run with other settings."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    before = state["fingerprint"]
    other = sorted(key for key in before.keys() | fingerprint.keys() if before.get(key) != fingerprint.get(key))
    if other:
        told = "; ".join(f"{key} was {before.get(key)!r}, is {fingerprint.get(key)!r}" for key in other)
        raise SwiftKVError(f"{checkpoint} belongs to a run with other settings: {told}")
    return state


def load_state(checkpoint: Path, student: Any, optimizer: Any) -> None:
    """Put a checkpoint's weights, optimizer and random state in place; every process calls it."""
    loaded = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    set_state_dict(
        student,
        optimizer,
        model_state_dict=load_file(checkpoint / "trained.safetensors"),
        optim_state_dict=loaded["optimizer"],
        options=StateDictOptions(full_state_dict=True, strict=False, ignore_frozen_params=True),
    )
    torch.set_rng_state(loaded["random"]["torch"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
