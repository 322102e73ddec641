"""What a converted checkpoint holds, for every family, and that it computes what the ordinary model does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import reference_swiftkv
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_suite.checkpoints.progress import Progress
from vllm_suite.checkpoints.shards import Entry, pack
from vllm_swiftkv.configs import register
from vllm_swiftkv.convert import layout
from vllm_swiftkv.convert.plan import choose_split
from vllm_swiftkv.convert.run import Request, convert
from vllm_swiftkv.families import FAMILIES, SwiftKVError

Checkpoint = Callable[..., Path]
NAMES = [family.base_model_type for family in FAMILIES]


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    return ram


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, found through the index and read by the library."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found: dict[str, torch.Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        found |= load_file(folder / file)
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def ordinary(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def converted(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    return convert(Request(model, out, **({"cut": 0.5} | options)), Progress())


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor(checkpoint: Checkpoint, tmp_path: Path, name: str, group: int) -> None:
    dtype = "float32" if group == 1 else "bfloat16" if group == 2 else "float16"
    model = checkpoint(name, dtype=dtype)
    report = converted(model, tmp_path / "out", group=group, shard_bytes=300_000)
    old, new = ordinary(model), tensors(tmp_path / "out")
    assert report["verified"]["tensors"] == report["tensors"] == len(new)
    leaves = ("weight", "bias") if name == "qwen2" else ("weight",)
    assert same(new.pop("model.norm_swiftkv.weight"), old["model.layers.4.input_layernorm.weight"])
    for i in range(4, 8):
        at = f"model.layers.{i}.self_attn."
        leads = (i - 4) % group == 0
        for leaf in leaves:
            assert same(new.pop(f"{at}q_proj_swiftkv.{leaf}"), old.pop(f"{at}q_proj.{leaf}"))
            for kv in "kv":
                if leads:
                    group_of = [old[f"model.layers.{i + j}.self_attn.{kv}_proj.{leaf}"] for j in range(group)]
                    mean = torch.stack([t.double() for t in group_of]).mean(0).to(group_of[0].dtype)
                    assert same(new.pop(f"{at}{kv}_proj_swiftkv.{leaf}"), mean)
        if not leads:
            old.pop(f"{at}k_norm.weight", None)
    dropped = {f"model.layers.{i}.self_attn.{kv}_proj.{leaf}" for i in range(4, 8) for kv in "kv" for leaf in leaves}
    for key in dropped:
        del old[key]
    # What is left is the ordinary model's, bit for bit, and nothing else.
    assert new.keys() == old.keys()
    assert all(same(new[key], old[key]) for key in old)
    assert dropped <= set(report["dropped"])


@pytest.mark.parametrize("name", NAMES)
def test_config_and_the_other_files(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    model = checkpoint(name)
    converted(model, tmp_path / "out", group=2)
    before, after = (json.loads((f / "config.json").read_text()) for f in (model, tmp_path / "out"))
    family = next(f for f in FAMILIES if f.base_model_type == name)
    own = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_key_value_layers": 4,
        "key_value_group_size": 2,
    }
    assert after == before | own
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (model / file).read_bytes()
    register()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.num_key_value_layers, config.key_value_group_size) == (4, 2)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", NAMES)
def test_with_one_skipped_layer_nothing_changes(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """The layer after the cut reads the very stream that its keys and values are made of, through its own norm."""
    model = checkpoint(name, std=0.1)
    converted(model, tmp_path / "out", cut=None, cut_layer=7)
    ids = [9, 300, 41, 77, 500, 12, 260]
    teacher = reference_swiftkv.load(model).logits(ids)
    assert torch.equal(reference_swiftkv.load(tmp_path / "out").logits(ids), teacher)
    converted(model, tmp_path / "more", cut=None, cut_layer=4)
    assert not torch.equal(reference_swiftkv.load(tmp_path / "more").logits(ids), teacher)


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_values_at_the_cut_are_the_teachers(checkpoint: Checkpoint, tmp_path: Path, name: str) -> None:
    """Against transformers' own modules: what its layer 4 computes, from what enters its layer 4."""
    model = checkpoint(name, std=0.1)
    converted(model, tmp_path / "out")
    new = tensors(tmp_path / "out")
    teacher = transformers.AutoModelForCausalLM.from_pretrained(model)
    layer = teacher.model.layers[4]
    seen: dict[str, torch.Tensor] = {}
    layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    for kv in "kv":
        getattr(layer.self_attn, f"{kv}_proj").register_forward_hook(
            lambda _module, _args, output, kv=kv: seen.update({kv: output})
        )
    with torch.no_grad():
        teacher(torch.tensor([[9, 300, 41, 77, 500, 12, 260]]))
        layer.input_layernorm.weight.copy_(new["model.norm_swiftkv.weight"])
        n = layer.input_layernorm(seen["x"])
        for kv in "kv":
            at = f"model.layers.4.self_attn.{kv}_proj_swiftkv."
            assert torch.equal(torch.nn.functional.linear(n, new[at + "weight"], new.get(at + "bias")), seen[kv])


def test_keeping_the_teacher_adds_only_what_is_dropped_otherwise(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint("qwen3")
    dropped = converted(model, tmp_path / "out", group=2)["dropped"]
    assert converted(model, tmp_path / "kept", group=2, keep_teacher=True)["dropped"] == []
    old, out, kept = ordinary(model), tensors(tmp_path / "out"), tensors(tmp_path / "kept")
    assert sorted(kept.keys() - out.keys()) == sorted(dropped)
    assert all(same(kept[name], (old | out)[name]) for name in kept)
    assert len(dropped) == 4 * 3 + 2  # q, k, v of four layers; k_norm of two followers


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 64}),
        ("qwen3", {"attention_bias": True}),
        ("qwen3_moe", {"mlp_only_layers": [1, 6], "attention_bias": True}),
        ("qwen3_moe", {"decoder_sparse_step": 2}),
    ],
)
def test_variants(checkpoint: Checkpoint, tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    model = checkpoint(name, **config)
    family = next(f for f in FAMILIES if f.base_model_type == name)
    shapes = {key: tuple(t.shape) for key, t in ordinary(model).items()}
    assert layout.expected(json.loads((model / "config.json").read_text()), family) == shapes
    converted(model, tmp_path / "out", cut=None, cut_layer=2, group=3)
    new = tensors(tmp_path / "out")
    assert ("lm_head.weight" in new) == (not config.get("tie_word_embeddings"))
    biases = [key for key in new if key.endswith("_proj_swiftkv.bias")]
    assert len(biases) == (6 + 2 * 2 if config.get("attention_bias") else 0)


def test_weight_files_keep_to_their_size_and_hold_the_layers_in_order(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = checkpoint("llama")
    whole = converted(model, tmp_path / "whole")
    assert whole["shards_written"] == ["model-00001-of-00001.safetensors"]
    limit = 262_144  # the embeddings, the largest tensor; the norm after them takes 512 bytes
    report = converted(model, tmp_path / "many", shard_bytes=limit)
    files = [tmp_path / "many" / name for name in report["shards_written"]]
    assert len(files) > 8
    order: list[int] = []
    for file in files:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert sum(opened.get_tensor(name).nbytes for name in names) <= limit
        order += sorted(int(name.split(".")[2]) for name in names if name.startswith("model.layers"))
    assert order == sorted(order)
    one, other = tensors(tmp_path / "whole"), tensors(tmp_path / "many")
    assert all(same(one[name], other[name]) for name in one | other)
    # A tensor larger than the limit has a file of its own.
    tiny = converted(model, tmp_path / "tiny", shard_bytes=1)
    assert len(tiny["shards_written"]) == tiny["tensors"]


def test_every_tensor_is_aligned_to_its_elements() -> None:
    """As the library's own writer has it; torch cannot view unaligned bytes as float32."""
    bytes3 = Entry("scaled", "F8_E4M3", (3,), ("x",))
    (shard,) = pack([bytes3, Entry("scale", "F32", (1,), ("y",)), Entry("norm", "BF16", (5,), ("z",))], 1000)
    assert [entry.name for entry in shard.entries] == ["scale", "norm", "scaled"]
    header = json.loads(shard.header[8:])
    assert [header[entry.name]["data_offsets"] for entry in shard.entries] == [[0, 4], [4, 14], [14, 17]]
    assert len(shard.header) % 8 == 0
    assert shard.size == len(shard.header) + 17


def test_other_forms_of_the_weights_and_hidden_files_stay_behind(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    # As in the cache of the hub: every file is a link.
    for file in checkpoint("mistral").iterdir():
        (model / file.name).symlink_to(file)
    (model / "templates").mkdir()
    (model / "templates" / "tool.jinja").write_text("{{ x }}")
    for name in ("consolidated.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", ".gitattributes"):
        (model / name).write_text("not for the result")
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("not for the result")
    converted(model, tmp_path / "out")
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {
        "config.json",
        "generation_config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "swiftkv_conversion.json",
        "templates/tool.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("layers", "cut", "group", "expected"),
    [
        (32, 0.5, 1, 16),
        (32, 0.25, 4, 24),
        (126, 0.5, 1, 63),
        (28, 0.25, 1, 21),
        (10, 0.7, 1, 3),
        (7, 0.5, 1, 4),  # 3.5: the smaller tail
        (7, 0.5, 2, 3),  # 3.5: 4 is nearer than 2
        (10, 0.5, 4, 6),  # 5: 4 is nearer than 8
        (36, 0.5, 12, 24),  # 18: as near to 12 as to 24
    ],
)
def test_the_cut_is_a_share_of_the_layers(layers: int, cut: float, group: int, expected: int) -> None:
    assert choose_split(layers, cut, None, group).cut == expected


@pytest.mark.parametrize("cut", [0.0, 1.0, -0.5, 1.5, 0.01, 0.99, math.nan, math.inf])
def test_a_cut_that_leaves_nothing_is_refused(cut: float) -> None:
    with pytest.raises(SwiftKVError, match=r"--cut"):
        choose_split(8, cut, None, 1)
