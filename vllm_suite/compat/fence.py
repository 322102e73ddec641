"""What fences say about an engine's model, from vLLM's configuration; shared by all connectors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_suite.handoff import digest


def model_digest(vllm_config: Any) -> str:
    """Model name, revision, configuration and, for a local checkpoint, each weight file's size and header.

    Two checkpoints that differ only in weight values under the same name are told apart by their revision; a local
    folder has none, so equal sizes and headers pass.
    """
    model = vllm_config.model_config
    hf_config = model.hf_config.to_json_string(use_diff=False)
    files = []
    folder = Path(model.model)
    if folder.is_dir():
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as stream:
                header = hashlib.blake2b(stream.read(65536), digest_size=16).hexdigest()
            files.append((path.name, path.stat().st_size, header))
    return digest(model.model, str(model.revision), hf_config, json.dumps(files), str(model.quantization))


def ec_layout_digest(vllm_config: Any) -> str:
    """What the bytes of an encoder output mean: their type, and the width of the language model they are made for."""
    model = vllm_config.model_config
    return digest("ec", str(model.dtype), str(model.hf_text_config.hidden_size))


def encoder_width(vllm_config: Any, modality: str) -> int:
    """Width of one embedding row of ``modality``, as the engine measured it or as the configuration says.

    A producer has measured it at its start. A consumer goes by the configuration: models with deep-stack features
    append one row of the language model's width for each level to an image's or a video's.
    """
    transfer = vllm_config.ec_transfer_config
    if transfer is not None and (measured := transfer.mm_encoder_output_widths.get(modality)):
        return int(measured)
    model = vllm_config.model_config
    vision = getattr(model.hf_config, "vision_config", None)
    levels = 0
    if modality in ("image", "video"):
        levels = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return int(model.get_inputs_embeds_size()) * (1 + levels)
