"""What a conversion will write, decided before the first byte: tensors, shards, config, and a fingerprint of it all.

The same request on the same source gives the same plan, byte for byte of every header. An interrupted conversion
therefore goes on exactly where the plan says, and a different request is noticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_suite.checkpoints.shards import Entry, Plan, natural_order, pack
from vllm_suite.checkpoints.source import Source, Tensor
from vllm_swiftkv.convert import layout, quantized
from vllm_swiftkv.convert.errors import ConvertError
from vllm_swiftkv.families import Family, Split

FORMAT = 1
NORM = "model.norm_swiftkv.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
_QKV = re.compile(r"self_attn\.([qkv])_proj\.(.+)$")


@dataclass(frozen=True)
class SwiftKVPlan(Plan):
    """A whole conversion."""

    family: Family
    split: Split
    dropped: tuple[str, ...]


def choose_split(layers: int, cut: float | None, cut_layer: int | None, group: int) -> Split:
    """The layers' split for ``--cut`` or ``--cut-layer``; exactly one of them is given.

    `cut` is the share of layers that prompt tokens skip, (L - l) / L in the paper's notation (arXiv 2410.03960,
    section 3); the tail becomes the nearest multiple of `group`, of two equally near ones the smaller. `cut_layer`
    is l itself and is taken as it is. Raises SwiftKVError where no such split exists.
    """
    if group < 1:
        raise ConvertError(f"--group must be at least 1, not {group}")
    if cut_layer is not None:
        return Split(layers, cut_layer, group)
    if cut is None or not 0 < cut < 1:
        raise ConvertError(f"--cut is a share of the layers between 0 and 1, not {cut}")
    # Rounded first: 0.7 * 10 is a little more than 7 in binary.
    tail = math.ceil(round(cut * layers / group, 9) - 0.5) * group
    if not 0 < tail < layers:
        raise ConvertError(
            f"--cut {cut:g} of {layers} layers leaves no split into groups of {group}; the nearest is {tail}"
        )
    return Split(layers, layers - tail, group)


def make_plan(
    source: Source, cut: float | None, cut_layer: int | None, group: int, keep: bool, limit: int
) -> SwiftKVPlan:
    """Check the source and plan its conversion into shards of at most `limit` bytes of data (a larger tensor has
    one of its own). `keep` leaves the tail's teacher q, k and v in. Raises SwiftKVError."""
    family = layout.family_of(source.config)
    split = choose_split(layout.integer(source.config, "num_hidden_layers"), cut, cut_layer, group)
    is_quantized = quantized.check(source.config)
    tensors = layout.checked(source, family, is_quantized)
    entries = list(_entries(tensors, split, family, keep, is_quantized))
    used = {name for entry in entries for name in entry.sources if not entry.initialised}
    facts = {
        "format": FORMAT,
        "layers": split.layers,
        "cut": split.cut,
        "group": split.group,
        "keep_teacher": keep,
        "shard_size": limit,
        "config": hashlib.sha256(json.dumps(source.config, sort_keys=True).encode()).hexdigest(),
        "files": {name: source.files[name].identity for name in sorted(source.files)},
    }
    return SwiftKVPlan(
        family=family,
        split=split,
        shards=pack(sorted(entries, key=lambda e: natural_order(e.name)), limit),
        config=_config(source.config, family, split, entries, tensors),
        dropped=tuple(sorted(set(source.tensors) - used, key=natural_order)),
        facts=facts,
    )


def _entries(
    tensors: Mapping[str, Tensor], split: Split, family: Family, keep: bool, is_quantized: bool
) -> Iterator[Entry]:
    """Every tensor of the result, in the order of the source."""

    def made(name: str, *sources: str, initialised: bool = True) -> Entry:
        first = tensors[sources[0]]
        return Entry(name, first.dtype, first.shape, sources, initialised)

    yield made(NORM, f"model.layers.{split.cut}.input_layernorm.weight")
    for name in tensors:
        match = layout.LAYER.match(name)
        layer, rest = (int(match[1]), match[2]) if match else (-1, "")
        if layer < split.cut:
            yield made(name, name, initialised=False)
            continue
        here, leads = f"model.layers.{layer}.", split.leader_of(layer) == layer
        cache_scale = layout.KV_SCALES.match(rest)
        qkv = None if cache_scale else _QKV.match(rest)
        # A follower has no key of its own to normalise and no cache of its own to scale.
        follows = not leads and (rest == "self_attn.k_norm.weight" or cache_scale is not None)
        if keep or not (qkv or follows):
            yield made(name, name, initialised=False)
        if qkv and (qkv[1] == "q" or leads):
            members = [layer] if qkv[1] == "q" else range(layer, layer + split.group)
            sources = [f"model.layers.{i}.{rest}" for i in members]
            _check_sources(sources, tensors, is_quantized)
            yield made(f"{here}self_attn.{qkv[1]}_proj_swiftkv.{qkv[2]}", *sources)


def _check_sources(names: list[str], tensors: Mapping[str, Tensor], is_quantized: bool) -> None:
    """Raises ConvertError where these tensors cannot be copied (one) or averaged (several)."""
    for name in names:
        dtype = tensors[name].dtype if name in tensors else "missing"
        if dtype not in FLOATS and not is_quantized:
            raise ConvertError(f"{name} is {dtype}, and config.json has no {quantized.KEY}: floating point is expected")
        if len(names) > 1 and (dtype not in FLOATS or name.endswith("_scale")):
            raise ConvertError(
                f"{name.rpartition('.')[0]} is quantised, and no mean of a group can be taken: use --group 1, or "
                "convert the unquantised checkpoint"
            )
        if dtype not in FLOATS and f"{name}_scale" not in tensors:
            raise ConvertError(f"{name} is {dtype}, but there is no {name}_scale")
        if dtype != tensors[names[0]].dtype:
            raise ConvertError(f"{name} is {dtype}, {names[0]} is {tensors[names[0]].dtype}: no mean of both")


def _config(
    config: Mapping[str, Any], family: Family, split: Split, entries: list[Entry], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    # auto_map would name Python code of the ordinary model.
    result = {key: value for key, value in config.items() if key != "auto_map"}
    result |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_key_value_layers": split.cut,
        "key_value_group_size": split.group,
    }
    if quantized.KEY in config:
        weights = [e for e in entries if e.initialised and e.name.endswith("_swiftkv.weight") and e.name != NORM]
        plain = [e.name.removesuffix(".weight") for e in weights if e.dtype in FLOATS]
        result[quantized.KEY] = quantized.rewritten(config[quantized.KEY], plain)
    return result
