"""Checks two checkpoints against each other and lays out the result, before a byte of it is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_suite.checkpoints.shards import Entry, Plan, natural_order, pack
from vllm_suite.checkpoints.source import CheckpointError, Source

FORMAT = 1
SCOPES = ("tensor", "global")
DTYPES = ("base", "tuned")
FLOATS = ("F32", "F16", "BF16")
_QUANTIZED = ("quantization_config", "compression_config")
# How config.json calls the dtype of the weights, in transformers 4 and 5.
_DTYPE = frozenset({"torch_dtype", "dtype"})
# What differs between any two saves and says nothing about the model.
_INCIDENTAL = _DTYPE | {"_name_or_path", "transformers_version", "use_cache"}
_NAMED_AT_MOST = 3


@dataclass(frozen=True)
class MergePlan(Plan):
    """A whole merge. `elements`: of each floating-point tensor. `copied`: tensors that are equal in both, not numbers.
    `tied`: stored copies of the embeddings that the result leaves out. `differences`: keys of config.json."""

    elements: dict[str, int]
    copied: tuple[str, ...]
    tied: tuple[str, ...]
    differences: tuple[str, ...]


def make_plan(base: Source, tuned: Source, keep: float, scale: float, scope: str, dtype: str, limit: int) -> MergePlan:
    """`dtype` says whose the result has. Raises CheckpointError where the two are no base and its tuned form, or a
    setting is out of range."""
    if not 0 < keep <= 1:
        raise CheckpointError(f"--keep is a share of the updates above 0 and at most 1, not {keep:g}")
    if not (scale > 0 and math.isfinite(scale)):
        raise CheckpointError(f"--scale is a positive number, not {scale:g}")
    if scope not in SCOPES:
        raise CheckpointError(f"--scope is one of {', '.join(SCOPES)}, not {scope!r}")
    if dtype not in DTYPES:
        raise CheckpointError(f"--dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if base.folder.resolve() == tuned.folder.resolve():
        raise CheckpointError(f"--base and --tuned are the same folder, {base.folder}")
    differences = _compare_configs(base, tuned)
    tied = _tied_copies(base, tuned)
    names = _compare_tensors(base, tuned, tied)
    like = base if dtype == "base" else tuned
    entries = [Entry(name, like.tensors[name].dtype, like.tensors[name].shape, (name,)) for name in names]
    return MergePlan(
        shards=pack(sorted(entries, key=lambda entry: natural_order(entry.name)), limit),
        config={k: v for k, v in tuned.config.items() if k not in _DTYPE}
        | {k: v for k, v in like.config.items() if k in _DTYPE},
        facts={
            "format": FORMAT,
            "keep": keep,
            "scale": scale,
            "scope": scope,
            "dtype": dtype,
            "shard_size": limit,
            "base": {name: base.files[name].identity for name in sorted(base.files)},
            "tuned": {name: tuned.files[name].identity for name in sorted(tuned.files)},
            "config": hashlib.sha256(json.dumps(tuned.config, sort_keys=True).encode()).hexdigest(),
        },
        elements={e.name: math.prod(e.shape) for e in entries if e.dtype in FLOATS},
        copied=tuple(e.name for e in entries if e.dtype not in FLOATS),
        tied=tied,
        differences=differences,
    )


def _compare_configs(base: Source, tuned: Source) -> tuple[str, ...]:
    """Keys whose values differ and matter. Raises CheckpointError for another architecture or a quantised model."""
    for source in (base, tuned):
        for key in _QUANTIZED:
            if source.config.get(key):
                method = source.config[key].get("quant_method") if isinstance(source.config[key], dict) else None
                raise CheckpointError(
                    f"{source.folder} is quantised ({key}: {method}), its stored numbers have no updates; merge the "
                    "unquantised checkpoints and quantise the result"
                )
    for key in ("model_type", "architectures"):
        if base.config.get(key) != tuned.config.get(key):
            raise CheckpointError(
                f"{key} is {base.config.get(key)} in {base.folder} and {tuned.config.get(key)} in {tuned.folder}: "
                "the tuned model is no trained form of the base"
            )
    keys = (base.config.keys() | tuned.config.keys()) - _INCIDENTAL
    return tuple(sorted(key for key in keys if base.config.get(key) != tuned.config.get(key)))


def _tied_copies(base: Source, tuned: Source) -> tuple[str, ...]:
    """Output embeddings that are stored although they are the input embeddings. Left out of the result: of two equal
    tensors a selection over the whole model could update one and not the other.

    Raises CheckpointError where one model ties the two and the other does not.
    """
    ties = [bool(source.config.get("tie_word_embeddings", False)) for source in (base, tuned)]
    heads = sorted(name for name in base.tensors.keys() | tuned.tensors.keys() if name.endswith("lm_head.weight"))
    for name in heads:
        if ties[0] != ties[1] or (not all(ties) and (name in base.tensors) != (name in tuned.tensors)):
            own, shared = (tuned, base) if ties[0] or name not in base.tensors else (base, tuned)
            raise CheckpointError(
                f"{shared.folder} ties {name} to the input embeddings, {own.folder} has weights of its own for it: an "
                "update is between two models of one form; save both with the same tie_word_embeddings"
            )
    if not all(ties):
        return ()
    for name in heads:
        for source in (base, tuned):
            if name in source.tensors:
                _check_copy(source, name)
    return tuple(heads)


def _check_copy(source: Source, name: str) -> None:
    prefix = name.removesuffix("lm_head.weight")
    head = source.tensors[name]
    found = [
        other
        for other, tensor in source.tensors.items()
        if other.startswith(prefix)
        and other != name
        and other.split(".")[-2] in ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
        and (tensor.dtype, tensor.shape) == (head.dtype, head.shape)
    ]
    if not any(same_bytes(source, name, source, other) for other in found):
        raise CheckpointError(
            f"config.json in {source.folder} ties {name} to the input embeddings, but the stored {name} differs from "
            "them: set tie_word_embeddings to false if it is meant, or remove the tensor"
        )


def _compare_tensors(base: Source, tuned: Source, tied: Iterable[str]) -> list[str]:
    """Names of the result's tensors. Raises CheckpointError where the two checkpoints have not the same ones."""
    ours, theirs = base.tensors.keys() - set(tied), tuned.tensors.keys() - set(tied)
    if ours - theirs:
        raise CheckpointError(
            f"{tuned.folder} lacks {_some(ours - theirs)} of {base.folder} (an adapter or a part of a model? merge it "
            "into its base model first)"
        )
    if theirs - ours:
        raise CheckpointError(f"{tuned.folder} has what {base.folder} does not: {_some(theirs - ours)}")
    for name in sorted(ours):
        there, here = base.tensors[name], tuned.tensors[name]
        if there.shape != here.shape:
            raise CheckpointError(
                f"{name} has shape {list(there.shape)} in {base.folder} and {list(here.shape)} in {tuned.folder}"
            )
        if there.dtype in FLOATS and here.dtype in FLOATS:
            continue
        # Masks and index tables are no weights; what is not the same number in both is a weight in a packed form.
        if not same_bytes(base, name, tuned, name):
            raise CheckpointError(
                f"{name} is {there.dtype} in {base.folder} and {here.dtype} in {tuned.folder}, and they differ: only "
                f"{', '.join(FLOATS)} have updates; merge unquantised checkpoints and quantise the result"
            )
    return sorted(ours)


def same_bytes(one: Source, name: str, other: Source, its: str) -> bool:
    """Whether two stored tensors are equal bit for bit, dtype and shape included."""
    a, b = one.tensors[name], other.tensors[its]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(x == y for x, y in zip(one.chunks(a), other.chunks(b), strict=True))


def _some(names: Iterable[str]) -> str:
    ordered: Sequence[str] = sorted(names, key=natural_order)
    more = f" and {len(ordered) - _NAMED_AT_MOST} more" if len(ordered) > _NAMED_AT_MOST else ""
    return ", ".join(ordered[:_NAMED_AT_MOST]) + more
