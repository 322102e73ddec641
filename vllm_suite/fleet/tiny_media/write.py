"""Write a family's checkpoint: configuration, tokenizer, processor and weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_suite.fleet.tiny_media.audio import qwen2_audio
from vllm_suite.fleet.tiny_media.config import MAX_POSITION, Blueprint, Family, MediaConfig
from vllm_suite.fleet.tiny_media.qwen_vl import qwen2_5_vl, qwen3_vl
from vllm_suite.fleet.tiny_media.tiled import internvl, llava_onevision
from vllm_suite.fleet.tiny_media.tokenizer import chat_template, write_tokenizer
from vllm_suite.fleet.tiny_media.weights import write_weights
from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID

_BLUEPRINTS: dict[Family, Callable[[MediaConfig], Blueprint]] = {
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "llava_onevision": llava_onevision,
    "qwen2_audio": qwen2_audio,
}
_STAMP = "tiny_media.json"
_FORMAT = 1


def write(family: Family, folder: Path, **sizes: int) -> Path:
    """Write a checkpoint of `family`; `sizes` are fields of `MediaConfig`. See `make_tiny_media`."""
    return make_tiny_media(folder, MediaConfig(family, **sizes))


def make_tiny_media(directory: Path, config: MediaConfig) -> Path:
    """Write the checkpoint into `directory` and return it; under 2 s, and at once where it is there already.

    A directory that holds a checkpoint of another configuration is rewritten. Raises OSError where the directory
    cannot be written, ImportError where numpy, safetensors or tokenizers is missing.
    """
    stamp = directory / _STAMP
    want = json.dumps({"format": _FORMAT, **asdict(config)}, sort_keys=True)
    if stamp.is_file() and stamp.read_text() == want:
        return directory
    blueprint = _BLUEPRINTS[config.family](config)
    directory.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    _write_json(directory / "config.json", blueprint.config)
    _write_json(
        directory / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "_from_model_config": True},
    )
    for name, value in blueprint.files.items():
        _write_json(directory / name, value)
    template = chat_template(blueprint.placeholders, blueprint.numbered)
    write_tokenizer(directory, config.vocab_size, MAX_POSITION, template, blueprint.extra_tokens)
    write_weights(directory, blueprint, config.seed)
    # Last: an interrupted write leaves no stamp and is done again.
    stamp.write_text(want)
    return directory


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
