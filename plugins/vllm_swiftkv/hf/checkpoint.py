"""Folders of SwiftKV and ordinary checkpoints: to a model, and from one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import logging

from vllm_swiftkv import configs
from vllm_swiftkv.families import Split, SwiftKVError, of_model_type
from vllm_swiftkv.hf.modeling import model_class, register

INDEX = "model.safetensors.index.json"
# What a served folder needs beside the weights; taken from the source as it is.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def load(
    path: Path | str,
    *,
    cut: int | None = None,
    group: int | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> Any:
    """A SwiftKV model from a SwiftKV checkpoint, or from an ordinary one with the student set from the teacher.

    Args:
        path: a folder with ``config.json`` and safetensors.
        cut, group: needed (``group`` defaults to 1) for an ordinary checkpoint; for a SwiftKV one they must agree
            with its own where given.
        dtype: of every weight; default as stored.
        attention: transformers' ``attn_implementation``.

    Returns:
        A ``<X>SwiftKVForCausalLM`` in evaluation mode. ``model.teacher`` says whether it has the teacher's way.

    Raises:
        SwiftKVError: not such a folder, a family without SwiftKV form, quantised, or tensors that do not fit.
    """
    path = Path(path)
    raw = read_config(path)
    family = of_model_type(str(raw.get("model_type")))
    if raw.get("quantization_config"):
        raise SwiftKVError(f"{path}: quantised weights are for serving; give the checkpoint they were made from")
    register()
    ordinary = raw["model_type"] == family.base_model_type
    if ordinary:
        if cut is None:
            raise SwiftKVError(f"{path} is an ordinary checkpoint: say how many layers keep their own keys and values")
        raw |= {"num_key_value_layers": cut, "key_value_group_size": group or 1}
    raw["model_type"] = family.model_type
    config = configs.config_class(family).from_dict(raw)
    split = Split.of(config)
    if (cut or split.cut, group or split.group) != (split.cut, split.group):
        raise SwiftKVError(
            f"{path} was made with num_key_value_layers {split.cut} and key_value_group_size {split.group}, "
            f"not {cut or split.cut} and {group or split.group}"
        )
    late = f"model.layers.{split.layers - 1}.self_attn.q_proj.weight"
    teacher = late in tensor_names(path)
    try:
        with quiet():
            model, report = model_class(family).from_pretrained(
                path,
                config=config,
                teacher=teacher,
                dtype=dtype or "auto",
                attn_implementation=attention,
                output_loading_info=True,
            )
    except (RuntimeError, OSError, ImportError) as error:
        raise SwiftKVError(f"{path} cannot be loaded as {family.architecture}: {error}") from error
    _check(path, model, report, ordinary)
    if ordinary:
        model.start_from_teacher()
    return model.eval()


def save(model: Any, path: Path | str, *, source: Path | None = None, state: dict[str, Tensor] | None = None) -> None:
    """Write a SwiftKV checkpoint, ready to serve: without the teacher's dead q, k and v of the tail.

    Each file appears whole, ``config.json`` last; a folder without it is an unfinished write. Files of other names in
    ``path`` stay.

    Args:
        source: folder whose tokenizer and generation settings go along.
        state: the full state dict where the model itself holds only a part (sharded training).
    """
    path = Path(path)
    partial = path / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dead = teacher_only(model)
    dtype = model.model.embed_tokens.weight.dtype
    tensors = model.state_dict() if state is None else state
    # Trained in float32 whatever the rest is in; served in the type of the rest.
    kept = {n: (t.to(dtype) if "_swiftkv" in n else t).detach() for n, t in tensors.items() if n not in dead}
    with quiet():
        model.save_pretrained(partial, state_dict=kept)
    for pattern in COMPANIONS if source is not None else ():
        for file in sorted(Path(source or ".").glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
    (path / "config.json").unlink(missing_ok=True)
    files = sorted(partial.iterdir(), key=lambda file: file.name == "config.json")
    for file in files:
        os.replace(file, path / file.name)
    partial.rmdir()


def teacher_only(model: Any) -> frozenset[str]:
    """Names of the parameters that only the teacher's way uses."""
    names = set()
    split: Split = model.split
    for i in range(split.cut, split.layers):
        modules = ["q_proj", "k_proj", "v_proj"] + ([] if i in split.leaders else ["k_norm"])
        names |= {f"model.layers.{i}.self_attn.{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return frozenset(names)


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint folder."""
    try:
        config = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise SwiftKVError(f"{path} has no config.json: give a folder with a Hugging Face checkpoint") from None
    except (OSError, ValueError) as error:
        raise SwiftKVError(f"{path / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SwiftKVError(f"{path / 'config.json'} is no JSON object")
    return config


def tensor_names(path: Path) -> frozenset[str]:
    """Names of every tensor in the safetensors files of a folder, read from their headers."""
    if (path / INDEX).is_file():
        return frozenset(json.loads((path / INDEX).read_text())["weight_map"])
    names: set[str] = set()
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    if not names:
        raise SwiftKVError(f"{path} has no safetensors files")
    return frozenset(names)


def _check(path: Path, model: Any, report: dict[str, Any], ordinary: bool) -> None:
    missing = set(report["missing_keys"])
    expected = set(model.student_parameters()) if ordinary else set()
    if missing != expected:
        names = sorted(missing - expected) or sorted(expected - missing)
        raise SwiftKVError(f"{path}: tensors missing or unexpected for its config.json: {', '.join(names[:4])}, ...")
    strange = sorted(name for name in report["unexpected_keys"] if "_swiftkv" in name)
    if strange:
        raise SwiftKVError(
            f"{path} has tensors that its num_key_value_layers and key_value_group_size leave no place for: "
            f"{', '.join(strange[:4])}"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No word of transformers on standard error: missing tensors are judged here, progress is the caller's."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
