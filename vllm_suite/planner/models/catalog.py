"""Models by name or by path: the bundled table, a checkpoint's folder, a config.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vllm_suite.planner.models.quant import Quantization, quantization_of
from vllm_suite.planner.models.read import model_of
from vllm_suite.planner.models.shapes import Model, ModelError
from vllm_suite.planner.models.swiftkv import with_swiftkv

_TABLE = Path(__file__).with_name("known.yaml")
# Trained further and shaped alike, as a rule: what is said of it says so.
_TUNED = re.compile(r"-(instruct|chat|it)$", re.IGNORECASE)


class Loaded(NamedTuple):
    """A model and how its checkpoint is stored."""

    model: Model
    stored: Quantization


def names() -> tuple[str, ...]:
    """The models of the bundled table."""
    return tuple(_table())


def load(name: str) -> Loaded:
    """A model of the bundled table, or of a config.json or the folder of one.

    A SwiftKV config (``num_key_value_layers``) gives the SwiftKV form. The tuned form of a model of the table
    (``-Instruct``, ``-chat``, ``-it``) is read as that one, and `Model.assumed` says so.

    Raises:
        ModelError: no such model, or one that cannot be described. OSError where a file cannot be read.
    """
    path = Path(name)
    if path.is_dir() or path.suffix == ".json":
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ModelError(f"{path}: there is no such file; --model takes a checkpoint's folder, or its config.json")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path}: not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ModelError(f"{path}: an object is expected")
        named = str(config.get("_name_or_path") or path.resolve().parent.name)
        return described(config, named, _pixels(path.parent))
    if name in _table():
        return described(known_config(name), name)
    base = _TUNED.sub("", name)
    if base in _table():
        model, stored = described(known_config(base), base)
        said = f"{name} is not in the bundled table: taken to be cut as {base}; its folder or config.json says for sure"
        return Loaded(replace(model, assumed=(said, *model.assumed)), stored)
    known = {each.lower(): each for each in _table()}
    close = [each for key, each in known.items() if name.lower() in key]
    close = close or [known[key] for key in get_close_matches(name.lower(), known, 2)]
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    raise ModelError(f"no model {name!r} in the bundled table, nor such a folder or config.json{hint}"
                     " Any other model: give the folder of its config.json")  # fmt: skip


def described(config: Mapping[str, Any], name: str, pixels: tuple[int, int] | None = None) -> Loaded:
    """A model by its config. Raises ModelError."""
    kind = str(config.get("model_type", ""))
    model = model_of({**config, "model_type": kind.removesuffix("_swiftkv")}, name, pixels)
    if kind.endswith("_swiftkv"):
        cut = config.get("num_key_value_layers")
        if not isinstance(cut, int):
            raise ModelError(f"{name}: a SwiftKV config without num_key_value_layers")
        model = with_swiftkv(model, cut, int(config.get("key_value_group_size") or 1))
    return Loaded(model, quantization_of(config, model.dtype))


def known_config(name: str) -> dict[str, Any]:
    """The keys of a bundled model's config that decide its shapes. Raises KeyError."""
    own = dict(_table()[name])
    like = own.pop("like", None)
    return {**known_config(like), **own} if like else own


@cache
def _table() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return table


def _pixels(folder: Path) -> tuple[int, int] | None:
    """The image processor's own limits, where its file is beside the config."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    size = found.get("size") or {}
    least = found.get("min_pixels") or size.get("shortest_edge")
    most = found.get("max_pixels") or size.get("longest_edge")
    return (int(least), int(most)) if least and most else None
