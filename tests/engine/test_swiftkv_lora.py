"""Adapters on layers of the head give what merged weights give; those that could not be right are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_swiftkv
import swiftkv_engine as se
import torch
from safetensors.torch import save_file
from swiftkv_engine import Ask, tokens

Checkpoint = Callable[..., Path]
RANK, ALPHA = 4, 8
HEAD = [f"model.layers.{i}.{m}" for i in range(4) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
WIDE = [
    *(f"model.layers.{i}.self_attn.{m}_proj" for i in (0, 3) for m in "qkvo"),
    *(f"model.layers.{i}.mlp.{m}_proj" for i in (1, 3) for m in ("gate", "up", "down")),
]
TAIL = [f"model.layers.{i}.{m}" for i in (4, 6, 7) for m in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")]


def make_adapter(path: Path, model: Path, modules: list[str], seed: int) -> Path:
    """A random adapter as PEFT writes one, strong enough to change the greedy tokens."""
    generator = torch.Generator().manual_seed(seed)
    weights = se.reference(model).weights
    tensors = {}
    for name in modules:
        # For a module that the model lacks, the shape of a square one: it is refused before it is read.
        rows, columns = weights.get(f"{name}.weight", torch.empty(128, 128)).shape
        at = f"base_model.model.{name}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{at}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.4
    path.mkdir()
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"},
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in modules}),
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def merged(model: Path, adapter: Path) -> reference_swiftkv.Reference:
    """The plain reference with the adapter added to its weights."""
    from safetensors.torch import load_file

    plain = reference_swiftkv.load(model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            plain.weights[name.removeprefix("base_model.model.").replace(".lora_A.", ".")] += ALPHA / RANK * (b @ a)
    return plain


def mixed(*adapters: Path) -> list[Ask]:
    """Requests with each adapter in the same steps; then, alone, without: on CPU vLLM's own LoRA operators take a
    request without an adapter for one with the last when others of its step have one."""
    loras = [*map(str, adapters)]
    asks = [Ask(tokens(40 + 31 * i, 20), max_tokens=8, at=i // 2, lora=loras[i % len(loras)]) for i in range(5)]
    return [*asks, Ask(tokens(50, 21), max_tokens=8, at=40), Ask(tokens(80, 21), max_tokens=8, at=41)]


def check(model: Path, asks: list[Ask], report: se.Report) -> None:
    references: dict[str | None, reference_swiftkv.Reference] = {None: se.reference(model)}
    changed = False
    for ask, answer in zip(asks, report.answers, strict=True):
        if ask.lora not in references:
            assert ask.lora is not None
            references[ask.lora] = merged(model, Path(ask.lora))
        se.matches(references[ask.lora], ask, answer, 1e-3)  # strong adapters: larger numbers, larger rounding
        changed |= ask.lora is not None and answer.tokens != references[None].greedy(list(ask.prompt), ask.max_tokens)
    assert changed, "the adapters change nothing"


LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}


@pytest.mark.parametrize(
    ("family", "group"), [("llama", 2), pytest.param("qwen3", 1, marks=pytest.mark.slow)], ids=["llama", "qwen3"]
)
def test_armed(checkpoint: Checkpoint, tmp_path: Path, family: str, group: int) -> None:
    """Adapters on the head: as merged. One that names a module of the tail: refused, and the engine goes on."""
    model = checkpoint(family, layers=8, cut=4, group=group)
    first, second = make_adapter(tmp_path / "a", model, HEAD, 1), make_adapter(tmp_path / "b", model, WIDE, 2)
    asks = mixed(first, second)
    with se.engine(model, budget=64, llm=LORA) as engine:
        report = engine.run(asks)
        check(model, asks, report)
        se.skipped_exactly(report)
        for i, name in enumerate(("self_attn.o_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.q_proj_swiftkv")):
            bad = make_adapter(tmp_path / f"bad{i}", model, [*HEAD, f"model.layers.5.{name}"], 3)
            with pytest.raises(se.EngineError, match=f"received .*layers.5.{name}") as error:
                engine.call(load_adapter, str(bad), 90 + i)
            assert error.value.kind in ("ValueError", "LoRAAdapterNotFoundError", "VLLMValidationError")
        check(model, asks, engine.run(asks))


def load_adapter(llm: Any, path: str, number: int) -> None:
    from vllm.lora.request import LoRARequest

    llm.llm_engine.add_lora(LoRARequest(path, number, path))


@pytest.mark.parametrize("eager", [True])
def test_unarmed(checkpoint: Checkpoint, tmp_path: Path, eager: bool) -> None:
    """With every row computed, o and MLP of the tail work too; the teacher's q, k and v are not there to adapt."""
    model = checkpoint("llama", layers=8, cut=4, group=2)
    first, second = make_adapter(tmp_path / "a", model, TAIL, 4), make_adapter(tmp_path / "b", model, HEAD + TAIL, 5)
    asks = mixed(first, second)
    with se.engine(model, armed=False, budget=64, eager=eager, llm=LORA) as engine:
        report = engine.run(asks)
        check(model, asks, report)
        for i, name in enumerate("qkv"):
            bad = make_adapter(tmp_path / f"bad{i}", model, [f"model.layers.4.self_attn.{name}_proj"], 3)
            with pytest.raises(se.EngineError, match=rf"received .*layers\.4\.self_attn\.{name}_proj"):
                engine.call(load_adapter, str(bad), 90 + i)
