"""Bytes per rank: shares of weights and cache under TP, PP and EP, and what fits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from fleets import SOURCE

from vllm_suite.planner.distserve.capacity import measured
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import ModelError, Parallel, Quantization, load
from vllm_suite.planner.models.memory import (
    activation_bytes,
    closed_form_tokens,
    kv_bytes_per_token,
    kv_capacity,
    weight_bytes,
)
from vllm_suite.planner.models.operations import operations, operators
from vllm_suite.planner.models.sharding import check, on_rank, stages
from vllm_suite.planner.models.swiftkv import with_swiftkv
from vllm_suite.planner.plan import PoolPlan
from vllm_suite.planner.simulator.setting import Setting

BF16 = Quantization()

# Usable bytes of a GPU, bytes of weights of one replica, layers and width: the constants of DistServe's closed form.
DISTSERVE = {
    "facebook/opt-13b": (79.36e9, 25.18e9, 40, 5120),
    "facebook/opt-66b": (78.93e9, 130.49e9, 64, 9216),
    "facebook/opt-175b": (78.60e9, 347.95e9, 96, 12288),
}


def total(name: str, parallel: Parallel, quant: Quantization = BF16) -> float:
    """Bytes of all ranks."""
    model = load(name).model
    check(model, parallel)
    return parallel.tp * parallel.dp * sum(weight_bytes(model, quant, parallel, s) for s in range(parallel.pp))


@pytest.mark.parametrize(
    "name", ["meta-llama/Llama-3.1-70B", "Qwen/Qwen3-30B-A3B", "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen3-0.6B"]
)
def test_one_rank_holds_the_checkpoint(name: str) -> None:
    # Padding of the vocabulary aside, which these models do not need.
    assert total(name, Parallel()) == 2 * load(name).model.params


def test_ranks_hold_shares_and_replicas() -> None:
    model = load("meta-llama/Llama-3.1-70B").model
    whole = 2 * model.params
    norms = 2 * model.hidden * (2 * 80 + 1)
    assert total(model.name, Parallel(tp=4)) == whole + 3 * norms
    assert total(model.name, Parallel(pp=4)) == whole
    # 8 KV heads on 16 ranks: each is held twice.
    doubled = 2 * 80 * 2 * 8 * 128 * 8192
    assert total(model.name, Parallel(tp=16)) == whole + 15 * norms + doubled
    qkv = on_rank(model.layers[0].linears[0], Parallel(tp=16))
    assert (qkv.inputs, qkv.outputs) == (8192, 4 * 128 + 2 * 128)
    down = on_rank(model.layers[0].linears[-1], Parallel(tp=8))
    assert (down.inputs, down.outputs) == (28672 // 8, 8192)


def test_a_tied_head_and_an_encoder() -> None:
    small = load("Qwen/Qwen3-0.6B").model
    # Two stages each hold the matrix that is embedding and output head.
    assert total(small.name, Parallel(pp=2)) == 2 * (small.params + small.embedding)
    seeing = load("Qwen/Qwen2.5-VL-7B-Instruct").model
    cut, dealt = (total(seeing.name, Parallel(tp=2, encoder_data=data)) for data in (False, True))
    assert dealt - cut == 2 * seeing.encoder_params


def test_experts_are_sliced_or_spread() -> None:
    model = load("Qwen/Qwen3-30B-A3B").model
    gate = next(each for each in model.layers[0].linears if each.name == "experts_gate_up")
    sliced, spread = on_rank(gate, Parallel(tp=4)), on_rank(gate, Parallel(tp=4, ep=True))
    assert (sliced.experts, sliced.outputs) == (128, 2 * 768 // 4)
    assert (spread.experts, spread.outputs) == (32, 2 * 768)
    assert sliced.weights == spread.weights == gate.weights // 4
    assert on_rank(gate, Parallel(tp=2, dp=8, ep=True)).experts == 8
    assert weight_bytes(model, BF16, Parallel(tp=4)) == weight_bytes(model, BF16, Parallel(tp=4, ep=True))


def test_cache_of_a_rank() -> None:
    model = load("meta-llama/Llama-3.1-70B").model
    each = kv_bytes_per_token(model, BF16, Parallel())
    assert [kv_bytes_per_token(model, BF16, Parallel(tp=tp)) / each for tp in (2, 8, 16)] == [1 / 2, 1 / 8, 1 / 8]
    assert kv_bytes_per_token(model, BF16, Parallel(pp=4), 3) == each / 4
    # MLA: every rank holds the compressed rows.
    deep = load("deepseek-ai/DeepSeek-V3").model
    assert kv_bytes_per_token(deep, BF16, Parallel(tp=8)) == kv_bytes_per_token(deep, BF16, Parallel())


def test_stages_are_vllms() -> None:
    model = load("meta-llama/Llama-3.1-405B").model
    assert [len(stage) for stage in stages(model, 4)] == [31, 32, 32, 31]
    assert [len(stage) for stage in stages(load("Qwen/Qwen2.5-7B-Instruct").model, 3)] == [9, 10, 9]
    assert [len(stage) for stage in stages(load("deepseek-ai/DeepSeek-V3").model, 8)] == [7, 7, 8, 8, 8, 8, 8, 7]


@pytest.mark.parametrize("name", DISTSERVE)
def test_capacity_is_what_distserve_measured(name: str) -> None:
    """D2: all 76 rows within 0.1 % by the closed form, and those that vLLM can cut by the planner's own sums."""
    usable, weights, layers, hidden = DISTSERVE[name]
    # Its engine counts the layers and neither embedding nor positions.
    model = replace(load(name).model, vocab=0, outside=0)
    fp16 = Quantization.named("float16")
    assert 2 * model.params == pytest.approx(weights, rel=1e-3)
    heads, own = hidden // 128, 0
    for tp, pp, tokens in (row[1:] for row in measured() if row[0] == name):
        closed = closed_form_tokens(tp * pp, usable, weights, layers, hidden)
        assert closed == pytest.approx(tokens, rel=1e-3, abs=16), (tp, pp)
        if heads % tp == 0 and layers % pp == 0:
            ours = kv_capacity(model, fp16, Parallel(tp, pp), usable, utilisation=1.0, block=16).tokens
            assert ours == pytest.approx(tokens, rel=2e-3, abs=16), (tp, pp)
            own += 1
    assert own >= 15


def test_all_rows_are_there() -> None:
    assert len({row[:3] for row in measured()}) == 76


def test_what_does_not_fit_is_said() -> None:
    model = load("meta-llama/Llama-3.1-70B").model
    with pytest.raises(ModelError, match=r"stage 0 holds 131\.4 GiB of weights"):
        kv_capacity(model, BF16, Parallel(), 80e9)
    small = kv_capacity(model, BF16, Parallel(tp=4), 80e9, activations=4e9, overhead=2e9)
    large = kv_capacity(model, Quantization.named("bfloat16", kv="fp8"), Parallel(tp=4), 80e9)
    assert large.tokens > 2 * small.tokens
    assert small.tokens % 16 == 0


def test_peak_grows_with_the_step() -> None:
    model = load("meta-llama/Llama-3.1-8B").model
    few, many = (activation_bytes(model, BF16, Parallel(), n, 256) for n in (2048, 16_384))
    assert 0 < few < many
    # 256 rows of logits in 16 bits and twice in float32.
    assert few >= 256 * 128_256 * 10


@pytest.mark.parametrize(
    ("name", "parallel", "says"),
    [
        ("meta-llama/Llama-3.1-8B", Parallel(tp=3), "32 heads cannot be cut over 3"),
        ("Qwen/Qwen2.5-7B-Instruct", Parallel(tp=14), "4 KV heads and 14 ranks"),
        ("Qwen/Qwen2.5-32B-Instruct", Parallel(pp=65), "64 layers cannot be cut into 65"),
        ("meta-llama/Llama-3.1-8B", Parallel(dp=2), "engines of their own"),
        ("meta-llama/Llama-3.1-8B", Parallel(ep=True), "no experts"),
        ("openai/gpt-oss-20b", Parallel(tp=64, dp=4), r"experts_gate_up \(5760\) cannot be cut over 256"),
    ],
)
def test_cuts_that_vllm_refuses(name: str, parallel: Parallel, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        check(load(name).model, parallel)
    with pytest.raises(ModelError, match="at least 1"):
        Parallel(tp=0)


def test_operations_are_two_for_each_weight() -> None:
    for name in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-30B-A3B", "deepseek-ai/DeepSeek-V3"):
        model = load(name).model
        whole = operations(model, Parallel())
        small = sum(layer.small for layer in model.layers) + model.outside
        assert whole.per_token + whole.per_sampled == pytest.approx(2 * (model.active_params - small), rel=1e-4), name
        halves = [operations(model, Parallel(pp=2), stage) for stage in range(2)]
        assert [sum(each) for each in zip(*halves, strict=True)] == pytest.approx(list(whole))
    model = load("meta-llama/Llama-3.1-8B").model
    assert operations(model, Parallel()).per_pair == operations(model, Parallel()).per_key == 4 * 32 * 32 * 128
    assert operations(model, Parallel(tp=4)).per_pair == 32 * 32 * 128
    # Experts spread over data-parallel ranks: each does its share for all of them.
    moe = load("Qwen/Qwen3-30B-A3B").model
    assert operations(moe, Parallel(dp=4, ep=True)).per_token == pytest.approx(operations(moe, Parallel()).per_token)


def test_late_layers_work_on_sampled_rows() -> None:
    model = load("Qwen/Qwen3-8B").model
    swift = operations(with_swiftkv(model, 18, 1), Parallel())
    whole = operations(model, Parallel())
    assert swift.per_token + swift.per_sampled == pytest.approx(whole.per_token + whole.per_sampled)
    assert 0.5 < swift.per_token / whole.per_token < 0.55
    assert (swift.per_pair, swift.per_key) == (whole.per_pair / 2, whole.per_key)


def test_the_products_of_a_rank() -> None:
    found = {each.product.linear.name: each for each in operators(load("Qwen/Qwen3-30B-A3B").model, Parallel(tp=2))}
    assert {name: (each.product.inputs, each.product.outputs, each.layers) for name, each in found.items()} == {
        "qkv_proj": (2048, 2048 + 2 * 256, 48),
        "o_proj": (2048, 2048, 48),
        "router": (2048, 128, 48),
        "experts_gate_up": (2048, 768, 48),
        "experts_down": (384, 2048, 48),
    }
    deep = operators(load("deepseek-ai/DeepSeek-V3").model, Parallel())
    assert {each.product.linear.name: each.layers for each in deep}["gate_up_proj"] == 3


def test_models_and_hardware_need_no_numpy() -> None:
    code = (
        "import sys; import vllm_suite.planner.models, vllm_suite.planner.hardware, vllm_suite.planner.models.memory;"
        "sys.exit(bool({'numpy', 'torch', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_an_engine_leaves_room_for_graphs_and_communicators() -> None:
    def blocks(machine: str, **more: float) -> int:
        model, quant = load("meta-llama/Llama-3.1-8B")
        setting = Setting(model, quant, cluster(machine), lambda pool: SOURCE, **more)  # type: ignore[arg-type]
        return setting.limits(PoolPlan("any", 1, max_num_batched_tokens=256)).blocks

    # A block of 16 tokens of this model takes 2 MiB.
    assert blocks("1xH100-SXM", runtime_bytes=0.0) - blocks("1xH100-SXM") == pytest.approx(512, abs=1)
    assert blocks("1xH100-SXM") - blocks("1xH100-SXM", runtime_bytes=3 * 2.0**30) == pytest.approx(1024, abs=1)
    model, quant = load("meta-llama/Llama-3.1-8B")
    assert Setting(model, quant, cluster("1xcpu-2core"), lambda pool: SOURCE).overhead == 0
