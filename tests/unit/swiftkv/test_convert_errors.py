"""Every refusal: one clear line, exit status 2, and nothing made, lost or overwritten."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file

from vllm_suite.checkpoints.progress import Progress
from vllm_suite.cli.main import main
from vllm_swiftkv.convert.run import Request, convert
from vllm_swiftkv.convert.verify import VerificationError, verify

Checkpoint = Callable[..., Path]
WEIGHTS = "model.safetensors"


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    return ram


@pytest.fixture
def model(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    # The MLP's tensors are too large to be compared as a whole.
    return shutil.copytree(checkpoint("llama", intermediate_size=1024), tmp_path / "model")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(capsys: pytest.CaptureFixture[str], model: Path, *words: str, out: Path | None = None) -> str:
    """The error line of a conversion that must be refused and must not touch the disk."""
    out = out or model.parent / "out"
    before = snapshot(model.parent)
    words = words or ("--cut", "0.5")
    assert main(["swiftkv", "convert", "--model", str(model), "-o", str(out), *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    prefix = "vllm-suite swiftkv convert: error: "
    assert last.startswith(prefix)
    assert snapshot(model.parent) == before
    return last.removeprefix(prefix)


def edit_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text()) | fields
    kept = {key: value for key, value in config.items() if value is not ...}
    (model / "config.json").write_text(json.dumps(kept))


def edit_weights(model: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(model / WEIGHTS) | changes
    save_file({key: value for key, value in tensors.items() if value is not None}, model / WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' has no SwiftKV form; supported: llama, mistral, qwen2"),
        ({"model_type": ...}, "model_type 'None' has no SwiftKV form"),
        ({"model_type": "llama_swiftkv"}, "this is a SwiftKV checkpoint already"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM can be converted"),
        ({"architectures": ...}, "architectures is None; only LlamaForCausalLM"),
        ({"num_hidden_layers": ...}, "num_hidden_layers is None; a positive integer"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'; a positive integer"),
        ({"num_hidden_layers": 9}, "lacks model.layers.8.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 6}, "has what a llama model does not: model.layers.6"),
        ({"head_dim": 16}, r"self_attn.q_proj.weight has shape [128, 128]; config.json asks for [64, 128]"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias and 31 more"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq' is not supported"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; an object"),
    ],
)
def test_a_config_that_does_not_fit(
    model: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], reason: str
) -> None:
    edit_config(model, **fields)
    assert reason in refused(capsys, model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model.layers.5.self_attn.k_proj.weight": None}, "lacks model.layers.5.self_attn.k_proj.weight"),
        ({"model.layers.5.self_attn.k_proj.weight": torch.zeros(64, 64)}, "has shape [64, 64]; config.json asks"),
        ({"model.layers.5.input_layernorm.weight": None}, "lacks model.layers.5.input_layernorm.weight"),
        ({"model.vision.weight": torch.zeros(1)}, "has what a llama model does not: model.vision.weight"),
        ({"model.layers.5.self_attn.q_norm.weight": torch.zeros(32)}, "llama model does not: model.layers.5.self_attn"),
        ({"model.layers.5.mlp.up_proj.weight_scale": torch.zeros(1)}, "does not: model.layers.5.mlp.up_proj.weight_sc"),
        (
            {"model.layers.5.self_attn.v_proj.weight": torch.zeros(64, 128, dtype=torch.int8)},
            "v_proj.weight is I8, and config.json has no quantization_config",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    model: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
) -> None:
    edit_weights(model, **changes)
    assert reason in refused(capsys, model)


def test_a_group_of_unequal_dtypes(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_weights(model, **{"model.layers.5.self_attn.k_proj.weight": torch.zeros(64, 128).half()})
    assert "layers.5.self_attn.k_proj.weight is F16, model.layers.4.self_attn.k_proj.weight is F32" in refused(
        capsys, model, "--cut", "0.5", "--group", "2"
    )


def test_old_rotary_buffers_are_left_out(model: Path) -> None:
    edit_weights(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)})
    report = convert(Request(model, model.parent / "out", cut=0.5), Progress())
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in report["dropped"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--cut 1.5", "--cut is a share of the layers between 0 and 1, not 1.5"),
        ("--cut 0.01", "--cut 0.01 of 8 layers leaves no split into groups of 1; the nearest is 0"),
        ("--cut 0.5 --group 16", "--cut 0.5 of 8 layers leaves no split into groups of 16"),
        ("--cut 0.5 --group 0", "--group must be at least 1, not 0"),
        ("--cut-layer 0", "num_key_value_layers must lie between 1 and 7 (the model has 8 layers), not 0"),
        ("--cut-layer 8", "num_key_value_layers must lie between 1 and 7 (the model has 8 layers), not 8"),
        ("--cut-layer 5 --group 2", "key_value_group_size 2 does not divide the 3 layers after layer 5"),
        ("--cut-layer 5 --group -3", "--group must be at least 1, not -3"),
    ],
)
def test_a_cut_that_does_not_fit(model: Path, capsys: pytest.CaptureFixture[str], words: str, reason: str) -> None:
    assert reason in refused(capsys, model, *words.split())


@pytest.mark.parametrize("words", ["", "--cut 0.5 --cut-layer 4", "--cut half", "--cut 0.5 --shard-size 4XB"])
def test_bad_arguments(model: Path, words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["swiftkv", "convert", "--model", str(model), "-o", str(model.parent / "out"), *words.split()])
    assert end.value.code == 2


def index_of(model: Path, **weight_map: str) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def truncate(model: Path) -> None:
    os.truncate(model / WEIGHTS, (model / WEIGHTS).stat().st_size - 1)


def second_copy(model: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "b.safetensors")
    index_of(model, **{"lm_head.weight": WEIGHTS, "model.norm.weight": "b.safetensors"})


def only_pickle(model: Path) -> None:
    (model / WEIGHTS).rename(model / "pytorch_model.bin")


def header(model: Path, **entry: Any) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry}).encode()
    (model / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (shutil.rmtree, "is no folder; download the checkpoint first"),
        (lambda m: (m / "config.json").unlink(), "has no config.json: this is no Hugging Face checkpoint"),
        (lambda m: (m / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda m: (m / "config.json").write_text("[]"), "an object is expected, found list"),
        (lambda m: (m / WEIGHTS).unlink(), "holds no safetensors weights"),
        (only_pickle, "holds pickled weights (.bin, .pt), which can run code when read; save them as safetensors"),
        (lambda m: (m / WEIGHTS).rename(m / "other.safetensors"), "which of its .safetensors files count?"),
        (truncate, "the file is incomplete"),
        (lambda m: (m / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1"), "a Git LFS pointer"),
        (lambda m: (m / WEIGHTS).write_bytes(b""), "is no complete safetensors file"),
        (lambda m: index_of(m, x="gone.safetensors"), "gone.safetensors, named by the index, is missing"),
        (lambda m: index_of(m, x="../model/model.safetensors"), "named by the index, is missing"),
        (lambda m: index_of(m, x=WEIGHTS), "the index places x in model.safetensors, which does not have it"),
        (lambda m: (m / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (second_copy, "is in both b.safetensors and model.safetensors"),
        (lambda m: header(m, dtype="F3"), "dtype F3 is not known here"),
        (lambda m: header(m, shape=[2]), "a F32 of shape [2] does not take 4 bytes"),
        (lambda m: header(m, data_offsets=[4, 8]), "leaves a hole or an overlap"),
        (lambda m: header(m, shape=None), "its safetensors header cannot be read"),
    ],
)
def test_a_broken_checkpoint(
    model: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], reason: str
) -> None:
    damage(model)
    assert reason in refused(capsys, model)


def test_an_output_in_the_way(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = model.parent / "out"
    out.write_text("mine")
    assert "is in the way; nothing is overwritten" in refused(capsys, model)
    out.unlink()
    out.mkdir()
    (out / "mine").write_text("mine")
    assert "is not empty and not a conversion; nothing is overwritten" in refused(capsys, model)
    (out / "mine").unlink()
    partial = model.parent / "out.partial"
    partial.write_text("mine")
    assert "is in the way; nothing is overwritten" in refused(capsys, model)
    partial.unlink()
    partial.mkdir()
    (partial / "mine").write_text("mine")
    assert "was not left by a conversion; nothing is overwritten" in refused(capsys, model)
    (partial / "mine").unlink()
    assert "would lie inside the model's folder" in refused(capsys, model, out=model)
    assert "would lie inside the model's folder" in refused(capsys, model, out=model / "swiftkv")
    # An empty folder of either name is no obstacle, nor is one that a link names.
    link = model.parent / "link"
    link.symlink_to(out)
    assert main(["swiftkv", "convert", "--model", str(model), "--cut", "0.5", "-o", str(link)]) == 0
    assert (out / "model.safetensors.index.json").is_file()
    assert link.is_symlink()


def test_an_output_that_appears_meanwhile_is_kept(model: Path) -> None:
    out = model.parent / "out"

    class Intruding(Progress):
        def wrote(self, name: str) -> None:
            out.mkdir()
            (out / "mine").write_text("mine")

    with pytest.raises(ValueError, match="is complete but cannot become"):
        convert(Request(model, out, cut=0.5), Intruding())
    assert (out / "mine").read_text() == "mine"
    shutil.rmtree(out)
    assert convert(Request(model, out, cut=0.5), Progress())["shards_written"] == []


def test_no_room(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, 20 * 2**20))
    text = refused(capsys, model, "--cut", "0.5")
    assert "has 20.00 MiB free; the conversion needs" in text
    needed = float(text.split("needs ")[1].split()[0])
    assert needed == pytest.approx(16 + (model / WEIGHTS).stat().st_size / 2**20, rel=0.05)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40, math.ceil((needed + 0.01) * 2**20)))
    assert convert(Request(model, model.parent / "out", cut=0.5), Progress())["ok"]


def test_a_folder_that_cannot_be_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "file").write_text("")
    assert "Not a directory" in refused(capsys, model, out=model.parent / "file" / "out")


@pytest.mark.parametrize("what", ["copied", "initialised", "mean", "shape", "missing", "stray", "index", "config"])
def test_verification_finds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The result is damaged after it was written and before it is read back."""

    def damage(folder: Path) -> None:
        path = folder / "model-00001-of-00001.safetensors"
        tensors = load_file(path)
        if what == "copied":
            tensors["model.layers.6.mlp.up_proj.weight"][-1, -1] += 1
        elif what == "initialised":
            tensors["model.norm_swiftkv.weight"][3] += 1
        elif what == "mean":
            tensors["model.layers.4.self_attn.k_proj_swiftkv.weight"][3, 3] += 1e-5
        elif what == "shape":
            tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
        elif what == "missing":
            del tensors["model.layers.4.self_attn.o_proj.weight"]
        elif what == "stray":
            (folder / "model-00002-of-00002.safetensors").write_bytes(path.read_bytes())
        else:
            name = {"index": "model.safetensors.index.json", "config": "config.json"}[what]
            (folder / name).write_text("{}")
        save_file(tensors, path, metadata={"format": "pt"})

    def damaged(folder: Path, *rest: Any) -> Any:
        damage(folder)
        return verify(folder, *rest)

    monkeypatch.setattr("vllm_swiftkv.convert.run.verify", damaged)
    request = Request(model, tmp_path / "out", cut=0.5, group=2)
    with pytest.raises(VerificationError):
        convert(request, Progress())
    assert not (tmp_path / "out").exists()
    words = ["swiftkv", "convert", "--model", str(model), "--cut", "0.5", "-o", str(tmp_path / "cli")]
    assert main([*words, "--group", "2"]) == 1
    assert main([*words, "--group", "2", "--no-verify"]) == 0
    # The damaged files do not have the manifest's SHA-256: the next attempt writes them again.
    monkeypatch.undo()
    (tmp_path / "out.partial" / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    assert convert(request, Progress())["verified"]
