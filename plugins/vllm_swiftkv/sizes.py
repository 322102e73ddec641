"""What each kind of instance holds of a model: parameters and KV cache, from its config alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_swiftkv.convert.layout import LAYER, expected, integer
from vllm_swiftkv.families import Family, Split, SwiftKVError, of_model_type

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


@dataclass(frozen=True)
class Sizes:
    """Number of parameters held by each kind of instance, and KV cache elements per token.

    Attributes:
        ordinary: the model that was converted.
        swiftkv: the SwiftKV model as the suite loads it.
        with_teacher: the same with the tail's own q, k and v, which published checkpoints carry.
        prefill_only: the layers up to the cut and the projections of late keys and values.
        kv_ordinary: cache elements per token of the ordinary model.
        kv_swiftkv: of the SwiftKV model, prefill-only or not.
    """

    split: Split
    ordinary: int
    swiftkv: int
    with_teacher: int
    prefill_only: int
    kv_ordinary: int
    kv_swiftkv: int


def sizes(config: Mapping[str, Any], cut: int, group: int) -> Sizes:
    """Sizes for a ``config.json``, ordinary or SwiftKV.

    Raises:
        SwiftKVError: a model without a SwiftKV form, or a cut or group that does not fit.
    """
    family: Family = of_model_type(str(config.get("model_type")))
    split = Split(integer(config, "num_hidden_layers"), cut, group)
    shapes = {name: math.prod(shape) for name, shape in expected(config, family).items()}
    ordinary = sum(shapes.values())
    teacher = followers = later = late = 0
    for name, count in shapes.items():
        found = LAYER.match(name)
        if found is None:
            later += count if name in ("model.norm.weight", "lm_head.weight") else 0
            continue
        layer, rest = int(found[1]), found[2]
        if layer < split.cut:
            continue
        leads = layer == split.leader_of(layer)
        if rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            teacher += count
            late += count if leads else 0
        elif rest.startswith("self_attn.k_norm."):
            followers += 0 if leads else count
        else:
            teacher += count if rest.startswith("self_attn.q_proj.") else 0
            later += count
    norm = integer(config, "hidden_size")
    kv = sum(shapes[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "kv") // norm
    # A tail layer's q_proj_swiftkv takes the place of its q_proj, and the leaders' k and v that of all k and v.
    tail_kv = sum(shapes[f"model.layers.{split.cut}.self_attn.{n}"] for n in _kv_names(shapes, split.cut)) * split.tail
    swiftkv = ordinary - tail_kv + late - followers + norm
    return Sizes(
        split=split,
        ordinary=ordinary,
        swiftkv=swiftkv,
        with_teacher=swiftkv + teacher,
        prefill_only=swiftkv - later,
        kv_ordinary=kv * split.layers,
        kv_swiftkv=kv * (split.cut + len(split.leaders)),
    )


def _kv_names(shapes: Mapping[str, int], layer: int) -> list[str]:
    names = [f"{x}_proj.{kind}" for x in "kv" for kind in ("weight", "bias")]
    return [name for name in names if f"model.layers.{layer}.self_attn.{name}" in shapes]


def split_of(config: Mapping[str, Any], cut: float | None, group: int | None) -> tuple[int, int]:
    """Cut layer and group: the config's own where it is a SwiftKV one, else from ``cut``, the skipped share."""
    from vllm_swiftkv.convert.plan import choose_split

    own = config.get("num_key_value_layers")
    if isinstance(own, int):
        if cut is not None or group is not None:
            raise SwiftKVError("this is a SwiftKV model already: its config names the cut and the group")
        return own, int(config.get("key_value_group_size") or 1)
    chosen = choose_split(integer(config, "num_hidden_layers"), 0.5 if cut is None else cut, None, group or 1)
    return chosen.cut, chosen.group
