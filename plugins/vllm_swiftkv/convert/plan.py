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

from vllm_swiftkv.convert import layout, quantized
from vllm_swiftkv.convert.source import DTYPE_BYTES, ConvertError, Source, Tensor
from vllm_swiftkv.families import Family, Split

FORMAT = 1
NORM = "model.norm_swiftkv.weight"
FLOATS = ("F64", "F32", "F16", "BF16")
_QKV = re.compile(r"self_attn\.([qkv])_proj\.(.+)$")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Entry:
    """A tensor of the result: the bytes of its one source tensor, or the mean of several.

    `initialised`: no tensor of the ordinary model, but one that SwiftKV adds.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    initialised: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One weight file of the result: its complete header, then the data of `entries` in order."""

    name: str
    header: bytes
    entries: tuple[Entry, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `facts` is JSON and decides whether two conversions are the same one."""

    family: Family
    split: Split
    shards: tuple[Shard, ...]
    config: dict[str, Any]
    dropped: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of `facts`."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def entries(self) -> Iterator[Entry]:
        """The tensors of all shards."""
        return (entry for shard in self.shards for entry in shard.entries)

    @property
    def size(self) -> int:
        """Bytes of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def index(self) -> dict[str, Any]:
        """`model.safetensors.index.json`."""
        return {
            "metadata": {"total_size": sum(entry.size for entry in self.entries)},
            "weight_map": {entry.name: shard.name for shard in self.shards for entry in shard.entries},
        }


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


def make_plan(source: Source, cut: float | None, cut_layer: int | None, group: int, keep: bool, limit: int) -> Plan:
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
    return Plan(
        family=family,
        split=split,
        shards=pack(sorted(entries, key=lambda e: _order(e.name)), limit),
        config=_config(source.config, family, split, entries, tensors),
        dropped=tuple(sorted(set(source.tensors) - used, key=_order)),
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


def _order(name: str) -> tuple[Any, ...]:
    """Embeddings, layers by number, then the rest."""
    rank = 0 if name.startswith("model.embed") else 1 if name.startswith("model.layers.") else 2
    return rank, [int(part) if part.isdigit() else part for part in _DIGITS.split(name)]


def pack(entries: list[Entry], limit: int) -> tuple[Shard, ...]:
    """Weight files of at most `limit` bytes of data each, in the order of `entries`."""
    packs: list[list[Entry]] = []
    room = 0
    for entry in entries:
        if not packs or entry.size > room:
            packs.append([])
            room = limit
        packs[-1].append(entry)
        room -= entry.size
    # Widest dtypes first, as the library writes them: every tensor stays aligned to its elements.
    packs = [sorted(entries, key=lambda e: -DTYPE_BYTES[e.dtype]) for entries in packs]
    total = len(packs)
    names = [f"model-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    return tuple(Shard(name, _header(p), tuple(p)) for name, p in zip(names, packs, strict=True))


def _header(entries: list[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
