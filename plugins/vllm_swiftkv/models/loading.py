"""Names of checkpoint tensors, and where they go."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

import torch

from vllm_suite.compat.models import WeightsMapper
from vllm_swiftkv.families import Split, SwiftKVError

_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")
_LATE = re.compile(r"^self_attn\.([kv])_proj_swiftkv\.(.+)$")
_BIAS = re.compile(r"\.self_attn\.\w+\.bias$")
_TEACHER = re.compile(r"^self_attn\.[qkv]_proj\.")
# Parameters that every checkpoint carries; scales of a quantized KV cache, for one, may be absent.
_CARRIED = re.compile(r"[._](weight|bias|weight_packed|qweight)$")

MAPPER = WeightsMapper(
    orig_to_new_stacked={
        ".q_proj": (".qkv_proj", "q"),
        ".k_proj": (".qkv_proj", "k"),
        ".v_proj": (".qkv_proj", "v"),
        # Spelled with `.mlp`: `.experts.N.gate_proj` belongs to the fused experts.
        ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
        ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    }
)


def place(
    weights: Iterable[tuple[str, torch.Tensor]], split: Split, qk_norm: bool, prefill_only: bool, rows: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as the model's modules want them.

    Drops what a SwiftKV model does not use: the teacher's q, k and v of tail layers, which published
    checkpoints still carry, k norms of layers that own no keys, and with ``prefill_only`` the whole tail. Raises
    SwiftKVError for keys and values of a layer that owns none, and for others than ``rows`` rows of them.
    """
    for name, tensor in weights:
        found = _LAYER.match(name)
        if found is None:
            if not (prefill_only and (name.startswith("lm_head.") or name == "model.norm.weight")):
                yield name, tensor
            continue
        layer, rest = int(found[1]), found[2]
        if layer < split.cut:
            yield name, tensor
        elif late := _LATE.match(rest):
            if layer != split.leader_of(layer):
                raise SwiftKVError(
                    f"the checkpoint has {name}, but with key_value_group_size {split.group} layer {layer} uses the "
                    f"keys and values of layer {split.leader_of(layer)}; config.json does not fit the weights"
                )
            if late[2] == "weight" and tensor.shape[0] != rows:
                raise SwiftKVError(f"{name} has shape {list(tensor.shape)}; the config asks for {rows} rows")
            # vLLM's loader reads the shard from the tensor.
            tensor.shard_id = 2 * split.leaders.index(layer) + "kv".index(late[1])
            yield f"model.late_kv.proj.{late[2]}", tensor
        elif _TEACHER.match(rest):
            continue
        elif rest.startswith("self_attn.k_norm."):
            if qk_norm and layer == split.leader_of(layer):
                yield name, tensor
        elif not prefill_only:
            yield name.replace(".q_proj_swiftkv.", ".swiftkv_q_proj."), tensor


def no_bias_lost(
    placed: Iterable[tuple[str, torch.Tensor]], parameters: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """``placed`` as it is; raises SwiftKVError for a bias of attention that no parameter takes.

    vLLM's loader leaves such biases out without a word, since quantized checkpoints carry ones of zeros. Its Qwen3
    layers have no bias on the output projection, whatever ``attention_bias`` says.
    """
    for name, tensor in placed:
        if _BIAS.search(name) and bool(tensor.any()):
            taken = name
            for part, (fused, _) in MAPPER.orig_to_new_stacked.items():
                taken = taken.replace(f"{part}.", f"{fused}.")
            if taken not in parameters:
                raise SwiftKVError(f"the checkpoint has {name}, but vLLM's own layers of this family have no such bias")
        yield name, tensor


def require(parameters: Iterable[str], loaded: set[str], given: set[str], split: Split) -> None:
    """Raise SwiftKVError for what a model needs and its checkpoint lacks.

    vLLM's own check leaves out every linear layer of an unquantized model, whose weights would then be whatever was
    in memory, and takes a fused projection for loaded once one of its parts is.

    Args:
        parameters: names of the model's parameters.
        loaded: those that were set.
        given: names of the checkpoint's tensors.
    """
    missing = {name for name in parameters if _CARRIED.search(name) and name not in loaded}
    missing.discard("model.late_kv.proj.weight")  # by its parts, below
    parts: dict[str, set[str]] = defaultdict(set)
    for part, (fused, _) in MAPPER.orig_to_new_stacked.items():
        parts[fused].add(part)
    late_kinds: set[str] = set()
    for name in given:
        found = _LAYER.match(name)
        if found is None:
            continue
        if int(found[1]) >= split.cut:
            if late := _LATE.match(found[2]):
                late_kinds.add(late[2])
            if _TEACHER.match(found[2]):
                continue
        for together in parts.values():
            for part in together:
                if f"{part}." in name:
                    missing |= {name.replace(f"{part}.", f"{other}.") for other in together} - given
    owned = [f"model.layers.{i}.self_attn.{part}_proj_swiftkv" for i in split.leaders for part in "kv"]
    missing |= {f"{name}.{kind}" for name in owned for kind in late_kinds or {"weight"}} - given
    if missing:
        names = sorted(missing)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise SwiftKVError(f"the checkpoint lacks tensors of a SwiftKV model: {', '.join(names[:5])}{more}")


def lora_names(split: Split, armed: bool) -> WeightsMapper:
    """Renames by which vLLM refuses an adapter that cannot be right here.

    Modules of tail layers get a name that no module has, and vLLM's loader reports it. Teacher q, k and v of the
    tail do not exist here; with the skip armed, rows of the tail are not the rows that vLLM's LoRA kernels map to
    adapters.
    """
    tail = "|".join(str(i) for i in range(split.cut, split.layers))
    names = r"[\w.]+?" if armed else r"self_attn\.[qkv]_proj"
    pattern = re.compile(rf"(layers\.(?:{tail})\.)({names})(\.lora_|$)")
    return WeightsMapper(orig_to_new_regex={pattern: r"\1\2_of_swiftkv_tail\3"})
