"""Quantized weights and caches, as far as vLLM runs them on CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_swiftkv
import swiftkv_engine as se
import torch
from swiftkv_checkpoints import make_swiftkv_checkpoint
from swiftkv_engine import Ask, tokens
from test_swiftkv_loading import rewrite

# A value on the edge between two representable ones rounds either way, and later layers carry the difference on.
EDGES = 0.5
LINEAR = re.compile(r"layers\.\d+\.(self_attn|mlp)\.(?!.*norm|gate\.).*\.weight$")
ASKS = [Ask(tokens(n, 30), max_tokens=8, at=i) for i, n in enumerate((70, 9, 130, 33))]


class Int8Reference(reference_swiftkv.Reference):
    """Linear layers of the blocks on int8 inputs, one scale per token: W8A8 as compressed-tensors defines it."""

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if LINEAR.search(f"{name}.weight"):
            scale = x.abs().amax(-1, keepdim=True) / 127
            x = (x / scale).round().clamp(-128, 127) * scale
        return super().linear(name, x)


def to_int8(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """W8A8 int8, one scale per output channel, written as compressed-tensors writes it."""
    for name in [n for n in weights if LINEAR.search(n)]:
        scale = weights[name].abs().amax(-1, keepdim=True) / 127
        weights[name] = (weights[name] / scale).round().to(torch.int8)
        weights[f"{name}_scale"] = scale
    side = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        **{"quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed"},
        **{"ignore": ["lm_head"], "kv_cache_scheme": None},
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**side, "strategy": "channel", "dynamic": False},
                "input_activations": {**side, "strategy": "token", "dynamic": True},
            }
        },
    }


def int8_reference(path: Path) -> Int8Reference:
    import json

    from safetensors.torch import load_file

    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    stored = load_file(path / "model.safetensors")
    weights = {n: t.float() * stored.get(f"{n}_scale", torch.ones(1)) for n, t in stored.items() if "_scale" not in n}
    return Int8Reference(config, weights)


@pytest.mark.parametrize(
    ("family", "group", "armed"),
    [
        ("llama", 2, True),
        pytest.param("llama", 1, False, marks=pytest.mark.slow),
        pytest.param("qwen2", 4, True, marks=pytest.mark.slow),
        pytest.param("qwen3", 1, True, marks=pytest.mark.slow),
    ],
)
def test_int8_weights(tmp_path: Path, family: str, group: int, armed: bool) -> None:
    """Scales of the fused late projection are each leader's own: no two are equal here."""
    model = rewrite(make_swiftkv_checkpoint(tmp_path / "m", family, group=group), to_int8)
    with se.engine(model, armed=armed, budget=64) as engine:
        assert engine.call(late_scheme) == "CompressedTensorsW8A8Int8"
        given = torch.randn(9, 128)
        projected = engine.call(late_projection, given)
        report = engine.run(ASKS)
    plain = int8_reference(model)
    names = [f"model.layers.{i}.self_attn.{x}_proj_swiftkv" for i in range(4, 8, group) for x in "kv"]
    assert torch.allclose(projected, torch.cat([plain.linear(name, given) for name in names], -1), atol=1e-4)
    near(plain, report)
    if armed:
        se.skipped_exactly(report)


def near(plain: reference_swiftkv.Reference, report: se.Report) -> None:
    """Log-probabilities within `EDGES`, and tokens that the reference holds for the best or as good."""
    for ask, answer in zip(ASKS, report.answers, strict=True):
        rows = se.logprobs(plain, (*ask.prompt, *answer.tokens[:-1]))[len(ask.prompt) - 1 :]
        for row, token, given in zip(rows, answer.tokens, answer.logprobs, strict=True):
            se.close(row, {token: given[token]}, EDGES, f"prompt of {len(ask.prompt)}")
            assert row.max() - row[token] <= EDGES


def late_projection(llm: Any, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return se.runner(llm).model.model.late_kv.proj(given)[0].clone()


def late_scheme(llm: Any) -> str:
    return type(se.runner(llm).model.model.late_kv.proj.scheme).__name__


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="vLLM's FP8 cache on CPU needs AVX-512")
@pytest.mark.parametrize(("family", "group"), [("llama", 2), pytest.param("qwen3", 1, marks=pytest.mark.slow)])
def test_fp8_cache(checkpoint: Callable[..., Path], family: str, group: int) -> None:
    """Armed as unarmed, exactly: both read the same rounded keys and values."""
    model = checkpoint(family, layers=8, cut=4, group=group)
    reports = []
    for armed in (True, False):
        with se.engine(model, armed=armed, budget=64, llm={"kv_cache_dtype": "fp8"}) as engine:
            assert engine.call(cache_dtype) == "torch.uint8"
            reports.append(engine.run(ASKS))
    skipping, whole = reports
    se.skipped_exactly(skipping)
    se.skipped_nothing(whole)
    for a, b in zip(skipping.answers, whole.answers, strict=True):
        assert a.tokens == b.tokens
        for one, other in zip(a.logprobs, b.logprobs, strict=True):
            assert one == pytest.approx(other, abs=se.TOLERANCE)


def cache_dtype(llm: Any) -> str:
    return str(se.runner(llm).kv_caches[-1].dtype)
