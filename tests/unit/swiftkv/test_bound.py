"""The bound beside which the prefill benchmark prints its measurements."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from swiftkv_shapes import PRESETS, Shape, bound, layer_flops

LLAMA_8B, LLAMA_70B = PRESETS["8b"], PRESETS["70b-tp4"]
QWEN3_8B = Shape(36, 4096, 12288, 32, 8, 128, 151936)
TOKENS = (512, 2048, 8192, 32768, 131072)


@pytest.mark.parametrize(
    ("shape", "cut", "wanted"),
    [
        (LLAMA_8B, 24, (1.317, 1.317, 1.319, 1.323, 1.328)),
        (LLAMA_8B, 16, (1.927, 1.929, 1.935, 1.953, 1.978)),
        (LLAMA_8B, 12, (2.507, 2.512, 2.526, 2.565, 2.618)),
        (LLAMA_70B, 40, (1.962, 1.962, 1.964, 1.971, 1.983)),
        (QWEN3_8B, 27, (1.314, 1.315, 1.317, 1.322, 1.328)),
    ],
    ids=["8B 25 %", "8B 50 %", "8B 62.5 %", "70B 50 %", "Qwen3-8B 25 %"],
)
def test_it_is_the_published_table(shape: Shape, cut: int, wanted: tuple[float, ...]) -> None:
    assert [round(bound(shape, tokens, cut), 3) for tokens in TOKENS] == list(wanted)


def test_flops_of_a_prompt_token_are_the_papers() -> None:
    def giga(tokens: int, cut: int) -> float:
        flops = layer_flops(LLAMA_70B, tokens)
        return (cut * flops.total + (LLAMA_70B.layers - cut) * flops.kv) / 1e9

    assert giga(0, 80) == pytest.approx(136.9, abs=0.05)
    assert giga(0, 40) == pytest.approx(69.8, abs=0.05)
    assert giga(131072, 80) == pytest.approx(308.7, abs=0.05)
    assert giga(131072, 40) == pytest.approx(155.7, abs=0.05)


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("cached", [0, 11])
def test_attention_is_the_mean_over_the_prompts_tokens(tokens: int, cached: int) -> None:
    """Two products of ``heads * head_dim`` by the tokens seen, two FLOPs each; the mean of n + 1 is taken as n."""
    shape = PRESETS["125m"]
    width = shape.heads * shape.head_dim
    exact = sum(2 * 2 * width * (cached + seen) for seen in range(1, tokens + 1)) / tokens
    assert layer_flops(shape, tokens, cached).attention == pytest.approx(exact - 2 * width)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
def test_it_is_the_ratio_of_what_is_computed(group: int) -> None:
    """Counted layer by layer: leaders compute K and V, followers nothing."""
    shape, cut, tokens = PRESETS["125m"], 8, 2000
    flops = layer_flops(shape, tokens)
    full = sum(flops.total for _ in range(shape.layers))
    skipped = sum(flops.total if i < cut else flops.kv if (i - cut) % group == 0 else 0 for i in range(shape.layers))
    assert bound(shape, tokens, cut, group) == pytest.approx(full / skipped)


def test_longer_prompts_and_larger_groups_approach_the_share_of_layers() -> None:
    shape = PRESETS["125m"]
    rising = [bound(shape, tokens, 8, group) for tokens, group in ((128, 1), (2000, 1), (2000, 4), (10**9, 4))]
    assert rising == sorted(rising)
    assert rising[-1] == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize(("cut", "group"), [(0, 1), (16, 1), (8, 3), (8, 0)])
def test_a_split_that_no_model_has_is_refused(cut: int, group: int) -> None:
    with pytest.raises(ValueError, match=r"the cut must lie|groups of"):
        bound(PRESETS["125m"], 100, cut, group)


def test_a_shape_that_no_model_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heads \(12\) must be a multiple of kv_heads \(5\)"):
        dataclasses.replace(PRESETS["125m"], kv_heads=5)
    with pytest.raises(ValueError, match="at least 1"):
        dataclasses.replace(PRESETS["125m"], layers=0)


def test_parameters_are_those_of_llama_3_1() -> None:
    assert LLAMA_8B.parameters / 1e9 == pytest.approx(8.03, abs=0.005)
    assert LLAMA_70B.parameters / 1e9 == pytest.approx(70.55, abs=0.005)
    assert PRESETS["125m"].parameters >= 100e6
