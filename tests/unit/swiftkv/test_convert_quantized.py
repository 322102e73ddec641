"""Quantised checkpoints: weights and scales move together, or the conversion is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from vllm_suite.checkpoints.progress import Progress
from vllm_swiftkv.convert.errors import ConvertError
from vllm_swiftkv.convert.run import Request, convert

Checkpoint = Callable[..., Path]
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
PLAIN = "model.layers.5.self_attn.k_proj"  # one layer that was left unquantised


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    return ram


def quantized(model: Path, out: Path, section: dict[str, Any], rows: int | None = None, plain: str = "") -> Path:
    """`model` with its linear layers in FP8 and one scale per tensor (`rows` None), per row (1), or per `rows` rows."""
    out.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj") or module == plain:
            tensors[name] = weight
            continue
        block = weight.float().reshape(1 if rows is None else weight.shape[0] // rows, -1)
        scale = block.abs().amax(1, keepdim=True) / 448
        tensors[name] = (block / scale).to(torch.float8_e4m3fn).reshape(weight.shape)
        tensors[f"{module}.weight_scale"] = scale.squeeze() if rows is None else scale
        if section["quant_method"] == "fp8":
            tensors[f"{module}.input_scale"] = torch.tensor(len(tensors) / 100)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return out


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("section", "rows"), [(COMPRESSED, 1), (COMPRESSED, None), (FP8, None)])
def test_weights_and_scales_are_copied(
    checkpoint: Checkpoint, tmp_path: Path, section: dict[str, Any], rows: int | None
) -> None:
    model = quantized(checkpoint("llama", dtype="bfloat16"), tmp_path / "model", section, rows)
    convert(Request(model, tmp_path / "out", cut=0.5, shard_bytes=500_000), Progress())
    old = load_file(model / "model.safetensors")
    new = {name: t for file in (tmp_path / "out").glob("*.safetensors") for name, t in load_file(file).items()}
    leaves = ["weight", "weight_scale", *(["input_scale"] if section is FP8 else [])]
    assert len(new) == len(old) + 1
    for i in range(4, 8):
        for x in "qkv":
            for leaf in leaves:
                a = new[f"model.layers.{i}.self_attn.{x}_proj_swiftkv.{leaf}"]
                b = old[f"model.layers.{i}.self_attn.{x}_proj.{leaf}"]
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                assert torch.equal(bits(a), bits(b))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == section


@pytest.mark.parametrize(("section", "key"), [(COMPRESSED, "ignore"), (FP8, "modules_to_not_convert")])
def test_a_layer_left_unquantised_stays_so(
    checkpoint: Checkpoint, tmp_path: Path, section: dict[str, Any], key: str
) -> None:
    listed = section | {key: ["lm_head", PLAIN]}
    model = quantized(checkpoint("llama", dtype="bfloat16"), tmp_path / "model", listed, plain=PLAIN)
    convert(Request(model, tmp_path / "out", cut=0.5), Progress())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == section | {key: ["lm_head", PLAIN, f"{PLAIN}_swiftkv"]}


def refused(model: Path, tmp_path: Path, reason: str, group: int = 1) -> None:
    with pytest.raises(ConvertError, match=reason):
        convert(Request(model, tmp_path / "out", cut=0.5, group=group), Progress())
    assert not list(tmp_path.glob("out*"))


def test_a_mean_of_quantised_weights_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantized(checkpoint("llama", dtype="bfloat16"), tmp_path / "model", COMPRESSED, 1)
    refused(
        model,
        tmp_path,
        r"layers.4.self_attn.k_proj is quantised, and no mean of a group can be taken: use --group 1",
        group=2,
    )


def test_a_missing_scale_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = quantized(checkpoint("llama", dtype="bfloat16"), tmp_path / "model", COMPRESSED, 1)
    tensors = load_file(model / "model.safetensors")
    del tensors[f"{PLAIN}.weight_scale"]
    save_file(tensors, model / "model.safetensors")
    refused(model, tmp_path, f"there is no {PLAIN}.weight_scale")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (FP8 | {"weight_block_size": [128, 128]}, "weight_block_size is not supported"),
        (COMPRESSED | {"format": "pack-quantized"}, "format 'pack-quantized' is not supported"),
        (COMPRESSED | {"config_groups": {"g": {"targets": ["re:.*q_proj"]}}}, "is not supported"),
        (
            COMPRESSED | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "group"}}}},
            "weight strategy 'group' is not supported",
        ),
        (COMPRESSED, "one scale per tensor or per output channel is supported"),
    ],
)
def test_other_schemes_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, section: dict[str, Any], reason: str
) -> None:
    model = quantized(checkpoint("llama", dtype="bfloat16"), tmp_path / "model", section, 4)
    refused(model, tmp_path, reason)
