"""Reads a written checkpoint back through the safetensors library and compares its structure with the plan."""

from __future__ import annotations

from pathlib import Path

from vllm_suite.checkpoints.shards import Plan, Shard
from vllm_suite.checkpoints.source import CONFIG, INDEX, CheckpointError, read_json


def check_structure(folder: Path, plan: Plan) -> None:
    """Config, index, and every tensor present with its shape and dtype and no other. Raises CheckpointError."""
    if read_json(folder / CONFIG) != plan.config:
        raise CheckpointError(f"{folder / CONFIG} is not the planned one")
    if read_json(folder / INDEX) != plan.index:
        raise CheckpointError(f"{folder / INDEX} is not the planned one")
    stray = {path.name for path in folder.glob("*.safetensors")} - {shard.name for shard in plan.shards}
    if stray:
        raise CheckpointError(f"{folder} holds a weight file that was not planned: {min(stray)}")
    for shard in plan.shards:
        _check_shard(folder / shard.name, shard)


def _check_shard(path: Path, shard: Shard) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping, keys() only
            found = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
            del slices
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read back: {error}") from None
    planned = {entry.name: (entry.dtype, entry.shape) for entry in shard.entries}
    if found != planned:
        name = min(n for n in found.keys() | planned.keys() if found.get(n) != planned.get(n))
        raise CheckpointError(f"{path}: {name} is {found.get(name)} where {planned.get(name)} was planned")
