"""Draw a checkpoint's weights and write them as two safetensors files with an index."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_suite.fleet.tiny_media.config import Blueprint, Shapes
from vllm_suite.fleet.tiny_media.tokenizer import special_ids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GAIN = 2.5  # of a matrix on a vector of unit entries: large enough that attention is sharp and every token depends
# on the whole prompt, small enough that rounding does not grow over the layers until it changes a token
_POSITION_SCALE = 0.5
_POSITIONS = ("position_embedding", "pos_embed", "embed_positions", "cls_token")


def tensor(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """The float32 values of one weight; they depend on nothing but the arguments."""
    import numpy as np

    if name.endswith(".bias"):
        return np.zeros(shape, dtype=np.float32)
    if len(shape) == 1 and not name.endswith("image_newline"):
        # Queries and keys that are normalised get here the length that they have elsewhere by their matrices.
        return np.full(shape, GAIN if name.endswith(("q_norm.weight", "k_norm.weight")) else 1, dtype=np.float32)
    # Without the prefixes, in which families differ: their language models then have the same weights.
    drawn = name.replace("language_model.", "").replace("model.", "")
    digest = hashlib.sha256(f"{seed}:{drawn}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))
    values: NDArray[np.float32] = generator.standard_normal(shape, dtype=np.float32)
    if any(part in name for part in _POSITIONS):
        values *= np.float32(_POSITION_SCALE)
    elif len(shape) > 1 and "embed_tokens" not in name:
        values *= np.float32(GAIN / math.sqrt(math.prod(shape[1:])))
    if name.endswith("lm_head.weight"):
        values[[i for i in special_ids() if i < shape[0]]] = 0
    return values


def write_weights(directory: Path, blueprint: Blueprint, seed: int) -> None:
    """Write the encoder and the language model to files of their own, each whole or not at all."""
    names: dict[str, str] = {}
    halves = (blueprint.tower, blueprint.language)
    for number, shapes in enumerate(halves, start=1):
        file = f"model-{number:05}-of-{len(halves):05}.safetensors"
        _write(directory / file, shapes, seed)
        names |= dict.fromkeys(shapes, file)
    total = sum(4 * math.prod(shape) for shapes in halves for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write(path: Path, shapes: Shapes, seed: int) -> None:
    from safetensors.numpy import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor(name, shape, seed) for name, shape in shapes.items()}, partial, {"format": "pt"})
    os.replace(partial, path)
