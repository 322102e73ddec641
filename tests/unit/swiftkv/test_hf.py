"""The transformers side of SwiftKV: the student is the plain reference, the teacher is the ordinary model."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import reference_swiftkv
import torch
import transformers
from safetensors.torch import load_file, save_file
from swiftkv_checkpoints import FAMILIES, make_swiftkv_checkpoint

from vllm_swiftkv.families import Split, SwiftKVError
from vllm_swiftkv.hf.checkpoint import load, save
from vllm_swiftkv.hf.modeling import register

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "group": 2}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "dense-and-sparse": ("qwen3_moe", {"mlp_only_layers": [1, 3]}),
    "one-tail-layer": ("qwen2", {"cut": 5}),
    "one-head-layer": ("qwen3", {"cut": 1, "group": 5}),
    "teacher-kept": ("qwen3", {"keep_teacher": True, "group": 2}),
}


def some_ids(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(16, 500) for _ in range(n)]


def student_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest: a float32 has 24 bits, and the logits come from some ten layers."""
    assert a.shape == b.shape
    assert float((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_is_the_reference(family: str, group: int, tmp_path: Path) -> None:
    path = make_swiftkv_checkpoint(tmp_path, family, layers=6, cut=2, group=group)
    model, reference = load(path), reference_swiftkv.load(path)
    ids = some_ids(29)
    same(student_logits(model, ids), reference.logits(ids))
    assert model.generate_greedy(ids, 6) == reference.greedy(ids, 6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_student_is_the_reference_in_every_variant(variant: str, tmp_path: Path) -> None:
    family, options = VARIANTS[variant]
    path = make_swiftkv_checkpoint(tmp_path, family, **({"layers": 6, "cut": 2} | options))
    ids = some_ids(70)
    same(student_logits(load(path), ids), reference_swiftkv.load(path).logits(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_the_ordinary_model(family: str, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint(family, num_hidden_layers=4, std=0.1)
    ordinary = transformers.AutoModelForCausalLM.from_pretrained(path)
    model, ids = load(path, cut=2), torch.tensor([some_ids(21), some_ids(21, 1)])
    with torch.no_grad():
        expected = ordinary(ids, output_hidden_states=True, use_cache=False)
        logits = model(ids, swiftkv=False).logits
        states = model.tail(model.head(ids), swiftkv=False)
    # The second and third are the distillation's way to the same numbers, layer by layer.
    for ours, theirs in (
        (logits, expected.logits),
        (states.penultimate, expected.hidden_states[-2]),
        (states.last, expected.hidden_states[-1]),
    ):
        same(ours, theirs)
        # How a grouped matrix product of experts rounds depends on where its operands lie in memory.
        assert family == "qwen3_moe" or torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_starts_from_its_teacher(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = checkpoint(family, num_hidden_layers=6, std=0.1)
    ordinary = load_file(path / "model.safetensors")
    model = load(path, cut=2, group=2)
    save(model, tmp_path, source=path)
    student = load_file(tmp_path / "model.safetensors")
    at = "model.layers.{}.self_attn.{}_proj{}.{}".format
    kinds = ("weight", "bias") if family == "qwen2" else ("weight",)
    assert torch.equal(student["model.norm_swiftkv.weight"], ordinary["model.layers.2.input_layernorm.weight"])
    for kind in kinds:
        for i in (2, 3, 4, 5):
            assert torch.equal(student[at(i, "q", "_swiftkv", kind)], ordinary[at(i, "q", "", kind)])
        for leader in (2, 4):
            for name in "kv":
                mean = (ordinary[at(leader, name, "", kind)] + ordinary[at(leader + 1, name, "", kind)]) / 2
                torch.testing.assert_close(student[at(leader, name, "_swiftkv", kind)], mean)
    # What is written is what is served: these tensors and no others, readable by the reference.
    fields = {"num_experts": 4} if family == "qwen3_moe" else {}
    served = make_swiftkv_checkpoint(tmp_path / "like", family, layers=6, cut=2, group=2, **fields)
    assert set(student) == set(load_file(served / "model.safetensors"))
    ids = some_ids(15)
    same(student_logits(model, ids), reference_swiftkv.load(tmp_path).logits(ids))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("word").input_ids


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_one_tail_layer_the_untrained_student_is_its_teacher(family: str, checkpoint: Callable[..., Path]) -> None:
    # Its only tail layer's keys and values come from the input that the ordinary layer takes them from.
    model = load(checkpoint(family, num_hidden_layers=4, std=0.1), cut=3)
    ids = torch.tensor([some_ids(21)])
    with torch.no_grad():
        same(model(ids).logits, model(ids, swiftkv=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_survives_loading_and_saving(family: str, tmp_path: Path) -> None:
    path = make_swiftkv_checkpoint(tmp_path / "a", family, layers=4, cut=2, group=2)
    save(load(path), tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    register()
    config = transformers.AutoConfig.from_pretrained(tmp_path / "b")
    assert (config.num_key_value_layers, config.key_value_group_size) == (2, 2)
    assert config.architectures == [FAMILIES[family] + "SwiftKVForCausalLM"]
    assert not (tmp_path / "b" / ".partial").exists()


def test_trained_weights_are_saved_in_the_type_of_the_others(tmp_path: Path) -> None:
    path = make_swiftkv_checkpoint(tmp_path / "a", "llama", layers=4, cut=2, dtype=torch.bfloat16)
    model = load(path)
    for parameter in model.student_parameters().values():
        parameter.data = parameter.data.float()
    save(model, tmp_path / "b")
    assert {t.dtype for t in load_file(tmp_path / "b" / "model.safetensors").values()} == {torch.bfloat16}


def test_without_teacher_weights_there_is_no_teacher(tmp_path: Path) -> None:
    model = load(make_swiftkv_checkpoint(tmp_path, "llama", layers=4, cut=2))
    ids = torch.tensor([some_ids(5)])
    assert not model.teacher
    assert not any(hasattr(layer.self_attn, "k_proj") for layer in model.model.layers[2:])
    with pytest.raises(SwiftKVError, match="no teacher weights"):
        model(ids, swiftkv=False)
    with pytest.raises(SwiftKVError, match="teacher weights"):
        model.start_from_teacher()
    with pytest.raises(SwiftKVError, match="KV cache"):
        model(ids, use_cache=True)


def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    model = load(make_swiftkv_checkpoint(tmp_path, "qwen3", layers=4, cut=2, group=2, keep_teacher=True))
    a, b = some_ids(9), some_ids(13, 1)
    positions = torch.tensor([[*range(9), *range(13)]])
    with torch.no_grad():
        for swiftkv in (True, False):
            packed = model(torch.tensor([a + b]), position_ids=positions, swiftkv=swiftkv).logits[0]
            alone = [model(torch.tensor([x]), swiftkv=swiftkv).logits[0] for x in (a, b)]
            same(packed, torch.cat(alone))


def test_only_the_late_projections_and_norm_are_the_students(tmp_path: Path) -> None:
    model = load(make_swiftkv_checkpoint(tmp_path, "qwen2", layers=4, cut=2, group=2, keep_teacher=True))
    split = Split(4, 2, 2)
    expected = {"model.norm_swiftkv.weight"}
    for i in (2, 3):
        for name in ("q", "k", "v") if i in split.leaders else ("q",):
            expected |= {f"model.layers.{i}.self_attn.{name}_proj_swiftkv.{kind}" for kind in ("weight", "bias")}
    assert set(model.student_parameters()) == expected


def test_recomputing_activations_does_not_change_the_gradients(tmp_path: Path) -> None:
    model = load(make_swiftkv_checkpoint(tmp_path, "qwen3", layers=5, cut=1, group=2))
    gradients = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(torch.tensor([some_ids(12)])).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.student_parameters().items()})
    assert all(torch.count_nonzero(g) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def rewrite(path: Path, **fields: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gpt2"}, "has no SwiftKV form"),
        ({"num_key_value_layers": 4}, "between 1 and 3"),
        ({"num_key_value_layers": None}, "no SwiftKV checkpoint"),
        ({"num_key_value_layers": 1}, "missing"),
        ({"key_value_group_size": 2}, "no place for.*3.self_attn.k_proj_swiftkv"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"intermediate_size": 64}, "cannot be loaded"),
    ],
)
def test_a_config_that_does_not_fit_its_tensors_is_an_error(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = make_swiftkv_checkpoint(tmp_path, "llama", layers=4, cut=2)
    rewrite(path, **fields)
    with pytest.raises(SwiftKVError, match=message):
        load(path)


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    path = make_swiftkv_checkpoint(tmp_path, "mistral", layers=4, cut=2, sliding_window=64)
    with pytest.raises(SwiftKVError, match="sliding-window"):
        load(path)


def test_other_bad_folders_are_errors(tmp_path: Path, checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(SwiftKVError, match=r"no config\.json"):
        load(tmp_path / "absent")
    with pytest.raises(SwiftKVError, match="ordinary checkpoint"):
        load(checkpoint("llama", num_hidden_layers=4, std=0.1))
    path = make_swiftkv_checkpoint(tmp_path / "made", "llama", layers=4, cut=2)
    with pytest.raises(SwiftKVError, match="num_key_value_layers 2"):
        load(path, cut=3)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SwiftKVError, match=r"3\.mlp\.up_proj"):
        load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(SwiftKVError, match="no safetensors"):
        load(path)


def test_a_broken_write_leaves_a_folder_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_swiftkv_checkpoint(tmp_path, "llama", layers=4, cut=2)
    model = load(path)
    (path / "other.txt").write_text("stays")

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fails)
        with pytest.raises(OSError, match="disk full"):
            save(model, path)
    assert not (path / "config.json").exists()
    save(model, path)
    assert (path / "config.json").exists()
    assert (path / "other.txt").read_text() == "stays"
    assert not list(path.glob(".partial"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_converted_checkpoint_is_the_same_start(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from vllm_swiftkv.convert import cli

    path = checkpoint(family, num_hidden_layers=6, std=0.1)
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    wanted = ["--model", str(path), "--cut-layer", "2", "--group", "2", "-o", str(tmp_path / "out"), "--keep-teacher"]
    assert cli.run(parser.parse_args(wanted)) == 0
    converted, direct = load(tmp_path / "out"), load(path, cut=2, group=2)
    assert converted.teacher
    ours, theirs = direct.state_dict(), converted.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
