"""What cannot be merged: one line that says what, where and what to do, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from merge_models import Tensors, write

from vllm_suite.cli.main import main


def weights(**changes: Any) -> Tensors:
    tensors = {
        "model.embed_tokens.weight": torch.ones(6, 4),
        "model.layers.0.weight": torch.ones(4, 4),
        "lm_head.weight": torch.full((6, 4), 2.0),
    }
    return {k: v for k, v in (tensors | {k.replace("__", "."): v for k, v in changes.items()}).items() if v is not None}


def moved(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
NAN = torch.tensor([1.0, 2.0, float("nan"), 4.0])
Case = tuple[Callable[[], Tensors], Callable[[], Tensors], dict[str, Any], dict[str, Any], str]
CASES: dict[str, Case] = {
    "shape": (
        weights, lambda: weights(lm_head__weight=torch.ones(7, 4)), {}, {},
        "lm_head.weight has shape [6, 4] in {base} and [7, 4] in {tuned}",
    ),
    "missing": (
        weights, lambda: weights(model__layers__0__weight=None), {}, {},
        "{tuned} lacks model.layers.0.weight of {base} (an adapter",
    ),
    "missing many": (
        lambda: {f"model.layers.{i}.weight": torch.ones(2) for i in range(12)}, lambda: {"x": torch.ones(2)}, {}, {},
        "{tuned} lacks model.layers.0.weight, model.layers.1.weight, model.layers.2.weight and 9 more",
    ),
    "unknown": (
        weights, lambda: weights(extra=torch.ones(2)), {}, {}, "{tuned} has what {base} does not: extra",
    ),
    "only the base ties": (
        lambda: weights(lm_head__weight=None), weights, TIED, UNTIED,
        "{base} ties lm_head.weight to the input embeddings, {tuned} has weights of its own for it",
    ),
    "only the tuned one ties": (
        weights, lambda: weights(lm_head__weight=None), UNTIED, TIED,
        "{tuned} ties lm_head.weight to the input embeddings, {base} has weights of its own for it",
    ),
    "head missing though untied": (
        weights, lambda: weights(lm_head__weight=None), UNTIED, UNTIED,
        "{tuned} ties lm_head.weight to the input embeddings",
    ),
    "stored copy that is none": (
        weights, weights, TIED, TIED, "the stored lm_head.weight differs from them",
    ),
    "quantised": (
        weights, weights, {}, {"quantization_config": {"quant_method": "awq"}},
        "{tuned} is quantised (quantization_config: awq)",
    ),
    "fp8": (
        lambda: weights(x=torch.ones(4).to(torch.float8_e4m3fn)),
        lambda: weights(x=(2 * torch.ones(4)).to(torch.float8_e4m3fn)), {}, {},
        "x is F8_E4M3 in {base} and F8_E4M3 in {tuned}, and they differ: only F32, F16, BF16 have updates",
    ),
    "packed": (
        lambda: weights(x=torch.ones(4, dtype=torch.int32)), lambda: weights(x=torch.zeros(4, dtype=torch.int32)),
        {}, {}, "x is I32 in {base} and I32 in {tuned}, and they differ",
    ),
    "double": (
        lambda: weights(x=torch.ones(4, dtype=torch.float64)), lambda: weights(x=torch.ones(4)), {}, {},
        "x is F64 in {base} and F32 in {tuned}",
    ),
    "architecture": (
        weights, weights, {}, {"architectures": ["OtherModel"]}, "architectures is ['LlamaForCausalLM'] in {base}",
    ),
    "model type": (weights, weights, {}, {"model_type": "qwen2"}, "model_type is llama in {base}"),
    "not a number": (
        lambda: weights(x=torch.ones(4)), lambda: moved(weights(x=NAN)), {}, {},
        "x: element 2 or its update is NaN or infinite",
    ),
    "infinite": (
        lambda: weights(x=torch.full((3,), float("inf"))), lambda: weights(x=torch.full((3,), float("inf"))), {}, {},
        "x: element 0 or its update is NaN or infinite",
    ),
    "too large an update": (
        lambda: weights(x=torch.full((3,), -3e38)), lambda: weights(x=torch.full((3,), 3e38)), {}, {},
        "x: element 0 or its update is NaN or infinite",
    ),
    "nothing learned": (weights, weights, {}, {}, "no weight of {tuned} differs from {base}"),
    "too large for its dtype": (
        lambda: weights(x=torch.full((2,), 6e4, dtype=torch.float16)), lambda: weights(x=torch.full((2,), 1e6)), {}, {},
        "x: a merged weight is too large for F16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("case", CASES)
def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, scope: str) -> None:
    base, tuned, base_config, tuned_config, reason = CASES[case]
    folders = {"base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    write(folders["base"], base(), **base_config)
    write(folders["tuned"], tuned(), **tuned_config)
    words = ["--base", str(folders["base"]), "--tuned", str(folders["tuned"]), "-o", str(tmp_path / "out")]
    assert main(["dler", "merge", *words, "--scope", scope]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("vllm-suite dler merge: error: ")
    assert reason.format(**folders) in last
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("out.partial/*.safetensors"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--keep", "0"], "--keep is a share of the updates above 0 and at most 1, not 0"),
        (["--keep", "1.5"], "--keep is a share"),
        (["--keep", "nan"], "--keep is a share"),
        (["--scale", "0"], "--scale is a positive number, not 0"),
        (["--scale", "inf"], "--scale is a positive number"),
        (["--tuned", "{base}"], "--base and --tuned are the same folder"),
        (["--tuned", "{base}/none"], "is no folder"),
        (["-o", "{base}/out"], "would lie inside the model's folder"),
        (["-o", "{base}"], "would lie inside the model's folder"),
        (["-o", "{tuned}/../file"], "is in the way; nothing is overwritten"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str) -> None:
    base, tuned = write(tmp_path / "base", weights()), write(tmp_path / "tuned", moved(weights()))
    (tmp_path / "file").write_text("mine")
    given = ["--base", str(base), "--tuned", str(tuned), "-o", str(tmp_path / "out")]
    given += [word.format(base=base, tuned=tuned) for word in words]
    assert main(["dler", "merge", *given]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file", "tuned"]


@pytest.mark.parametrize("damage", ["cut", "pickle", "adapter", "no config"])
def test_broken_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    base, tuned = write(tmp_path / "base", weights()), write(tmp_path / "tuned", moved(weights()))
    path = tuned / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "pickle":
        path.rename(tuned / "pytorch_model.bin")
    elif damage == "adapter":
        path.rename(tuned / "adapter_model.safetensors")
    else:
        (tuned / "config.json").unlink()
    assert main(["dler", "merge", "--base", str(base), "--tuned", str(tuned), "-o", str(tmp_path / "out")]) == 2
    expected = {
        "cut": "the file is incomplete",
        "pickle": "pickled weights",
        "adapter": "has neither model.safetensors nor",
        "no config": "no Hugging Face checkpoint",
    }
    assert expected[damage] in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_a_manifest_that_is_no_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = write(tmp_path / "base", weights()), write(tmp_path / "tuned", moved(weights()))
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "dler_merge.json").write_text(json.dumps({"plan": 1}))
    assert main(["dler", "merge", "--base", str(base), "--tuned", str(tuned), "-o", str(tmp_path / "out")]) == 2
    assert "is damaged; remove" in capsys.readouterr().err
