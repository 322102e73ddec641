"""Steps, lines of decode steps, DistServe's linear model (D3) and the roofline."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Model, ModelError, Parallel, Quantization, load, prefill_only, with_swiftkv
from vllm_suite.planner.sources.base import LatencySource, Outside, SourceError
from vllm_suite.planner.sources.efficiency import Efficiency
from vllm_suite.planner.sources.linear import distserve
from vllm_suite.planner.sources.roofline import RooflineSource, _one, _Stage, _undominated
from vllm_suite.planner.sources.steps import DecodeLine, Steps

FREE = {"step_us": 0, "sequence_us": 0, "kernel_us": 0}


def roofline(name: str, hardware: str, parallel: Parallel | None = None, **changes: object) -> RooflineSource:
    """A source with some of its constants changed."""
    loaded, found = load(name), cluster(hardware)
    return built(loaded.model, loaded.stored, parallel, hardware, Efficiency.of(found.device, **changes))


def built(
    model: Model, quant: Quantization, parallel: Parallel | None, hardware: str, efficiency: Efficiency | None = None
) -> RooflineSource:
    """A small one, to build fast."""
    return RooflineSource(
        model, quant, parallel or Parallel(), cluster(hardware),
        efficiency=efficiency, max_tokens=4096, max_sequences=512,
    )  # fmt: skip


def mixed(count: int, seed: int = 0) -> list[Steps]:
    """Steps of all kinds."""
    random.seed(seed)
    found = []
    for _ in range(count):
        chunks = [(random.randint(1, 500), random.choice([0, 0, 700])) for _ in range(random.randint(0, 3))]
        found.append(Steps.of(chunks, [random.randint(1, 3000) for _ in range(random.randint(0, 60))]))
    return [*found, Steps()]


def test_the_sums_of_a_step() -> None:
    steps = Steps.of(chunks=[(3, 0), (2, 10)], contexts=[5, 9])
    assert steps == Steps(5, 2, 10, 1 + 2 + 3 + 11 + 12, 2, 14, 9, 5)
    assert (steps.tokens, steps.sequences, steps.kv_tokens) == (7, 4, 29)


def test_a_line_of_decode_steps() -> None:
    random.seed(1)
    for slope in (0.0, 1e-9, 0.01, 0.3, -0.001):
        line = DecodeLine(0.5, slope)
        times = [0.5 + slope * i for i in range(200)]
        for count in (0, 1, 7, 200):
            assert line.total(count) == pytest.approx(math.fsum(times[:count]))
        for _ in range(50):
            within = random.uniform(0, line.total(150))
            count = line.within(within)
            assert line.total(count) <= within < line.total(count + 1)


@pytest.mark.parametrize("engine", ["distserve", "vllm"])
@pytest.mark.parametrize(("model", "tp"), [("facebook/opt-13b", 1), ("facebook/opt-66b", 4), ("facebook/opt-66b", 8)])
def test_the_linear_model_is_distserves(engine: str, model: str, tp: int) -> None:
    """D3: prefill a + b Σl + c Σl², decode a + b Σcontext + c batch, times over pp, prefill + pp ms a stage."""
    source = distserve(model, tp, pp=2, engine=engine)  # type: ignore[arg-type]
    own = source.coefficients
    lengths, contexts = [700, 33, 1500], [100] * 94
    a, b, c = own.prefill
    published = (a + b * sum(lengths) + c * sum(n * n for n in lengths)) / 2 + 2
    steps = Steps.of(chunks=[(n, 0) for n in lengths])
    assert source.stage_seconds(steps) * 1e3 == pytest.approx(published, rel=1e-12, abs=1e-9)
    assert source.step_seconds(steps) == 2 * source.stage_seconds(steps)
    for batch, (a, b, c) in ((contexts, own.decode_small), ([*contexts, 100], own.decode_large)):
        published = (a + b * sum(batch) + c * len(batch)) / 2
        assert source.stage_seconds(Steps.of(contexts=batch)) * 1e3 == pytest.approx(published, rel=1e-12, abs=1e-9)


def test_the_coefficients_are_the_published_ones() -> None:
    own = distserve("facebook/opt-13b", 2).coefficients
    assert own.prefill == pytest.approx((14.743, 0.068577, 2.4496e-6), rel=1e-4)
    assert own.decode_small == pytest.approx((13.2948, 3.4109e-4, 0.062964), rel=1e-4)
    with pytest.raises(SourceError, match=r"no DistServe coefficients for facebook/opt-13b TP8; there are .*TP4"):
        distserve("facebook/opt-13b", 8)
    with pytest.raises(SourceError, match="not both"):
        distserve("facebook/opt-13b", 2).step_seconds(Steps.of([(1, 0)], [1]))
    with pytest.raises(SourceError, match="without a cached prefix"):
        distserve("facebook/opt-13b", 2).step_seconds(Steps.of([(1, 5)]))


SOURCES = {
    "dense": lambda: roofline("meta-llama/Llama-3.1-8B", "RTX-PRO-6000"),
    "pipeline": lambda: roofline("Qwen/Qwen3-32B", "8xH100-SXM", Parallel(tp=2, pp=4)),
    "experts": lambda: roofline("Qwen/Qwen3-30B-A3B", "4xH200", Parallel(tp=2, dp=2, ep=True)),
    "latent": lambda: roofline("deepseek-ai/DeepSeek-V3", "16xH200", Parallel(tp=8, pp=2)),
    "windows": lambda: roofline("openai/gpt-oss-20b", "H100-SXM"),
    "swiftkv": lambda: built(with_swiftkv(load("Qwen/Qwen3-8B").model, 20, 4), Quantization(), None, "H100-SXM"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_one_step_arrays_and_lines_agree(kind: str) -> None:
    source: LatencySource = SOURCES[kind]()
    steps = mixed(60)
    together = source.seconds(Steps(*(np.array(column) for column in zip(*steps, strict=True))))
    assert together == pytest.approx([source.step_seconds(each) for each in steps], rel=1e-12)
    assert source.step_seconds(Steps()) == 0
    line = source.decode_line(30, 30 * 100.0)
    for index in (0, 1, 20, 27):
        step = source.step_seconds(Steps(decode_sequences=30, decode_context=30 * (100 + index)))
        assert line.seconds + line.slope * index == pytest.approx(step, rel=1e-9)
    assert line.steps == (28 if kind == "windows" else math.inf)


def test_decode_at_batch_one_reads_the_weights() -> None:
    source = roofline("meta-llama/Llama-3.1-8B", "H100-SXM", **FREE, memory=1.0, decode_attention=1.0)
    model, device = load("meta-llama/Llama-3.1-8B").model, source.cluster.device
    floor = 2 * (model.params - model.embedding) / device.bandwidth
    got = source.step_seconds(Steps.of(contexts=[1]))
    assert floor < got < 1.01 * floor
    # Each key more costs its cache's bytes.
    line = source.decode_line(1, 1.0)
    assert line.slope == pytest.approx(2 * 32 * 8 * 128 * 2 / device.bandwidth)


def test_a_long_prompt_computes_at_the_peak() -> None:
    source = roofline("meta-llama/Llama-3.1-8B", "H100-SXM", **FREE, matmul=1.0, half_rows=0, prefill_attention=1.0)
    model, device = load("meta-llama/Llama-3.1-8B").model, source.cluster.device
    blocks = model.params - 2 * model.embedding
    products = 2 * 4096 * blocks / device.flops("bf16")
    scores = 4 * 32 * 4096 * (4096 * 4097 / 2) / device.flops("bf16")
    got = source.step_seconds(Steps.of(chunks=[(4096, 0)]))
    assert products + scores < got < 1.1 * (products + scores)


def test_more_ranks_are_faster_and_not_linearly() -> None:
    steps = Steps.of(contexts=[1000] * 32)
    times = [roofline("meta-llama/Llama-3.1-70B", "8xH200", Parallel(tp=tp)).step_seconds(steps) for tp in (2, 4, 8)]
    assert times[0] > times[1] > times[2] > times[0] / 4
    piped = roofline("meta-llama/Llama-3.1-70B", "8xH200", Parallel(tp=2, pp=4))
    assert piped.step_seconds(steps) == pytest.approx(times[0], rel=0.02)
    assert piped.stage_seconds(steps) < times[0] / 3


@pytest.mark.parametrize(("name", "stages"), [("meta-llama/Llama-3.1-8B", 2), ("meta-llama/Llama-3.1-8B", 3)])
def test_the_slowest_stage_is_the_one_with_most_seconds(name: str, stages: int) -> None:
    source = roofline(name, "4xH100-SXM", Parallel(pp=stages))
    deciding = set[int]()
    for steps in [*mixed(200), Steps.of([(4096, 0)]), Steps.of(contexts=[4000] * 512), Steps.of(contexts=[1])]:
        rows, sampled = int(steps.tokens), int(steps.sequences)
        if not rows:
            continue
        keys = [sum(_one(cost, steps) for cost in each.attention) for each in source._stages]
        each = [
            float(stage.tokens[rows] + stage.sampled[sampled]) + keys[index]
            for index, stage in enumerate(source._stages)
        ]
        assert source.stage_seconds(steps) == pytest.approx(max(each) + source.host_seconds(sampled), rel=1e-14)
        deciding.add(each.index(max(each)))
    assert len(deciding) > stages - 2


def test_only_a_stage_that_another_is_never_faster_than_is_left_out() -> None:
    prompts, heads, neither = (
        _Stage(np.array([0.0, tokens]), np.array([0.0, sampled]), ())
        for tokens, sampled in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0))
    )
    for stages in ([prompts, heads, neither], [neither, heads, prompts]):
        ((_, kept),) = _undominated(stages)
        assert sorted(kept) == [([0.0, 1.0], [0.0, 2.0]), ([0.0, 2.0], [0.0, 1.0])]


def test_quantisation_halves_what_it_halves() -> None:
    model = load("meta-llama/Llama-3.1-70B").model
    free = Efficiency.of(cluster("H100").device, **FREE)
    full, eight, four = (
        built(model, Quantization.named("bfloat16", weights), Parallel(tp=4), "4xH100-SXM", free)
        for weights in ("bf16", "fp8", "int4")
    )
    one, long = Steps.of(contexts=[1]), Steps.of(chunks=[(4096, 0)])
    assert eight.step_seconds(one) < 0.65 * full.step_seconds(one)
    assert four.step_seconds(one) < 0.8 * eight.step_seconds(one)
    assert eight.step_seconds(long) < 0.65 * full.step_seconds(long)
    # int4 is weights only: prompts compute at the rate of bf16.
    assert four.step_seconds(long) == pytest.approx(full.step_seconds(long), rel=0.02)
    small = built(model, Quantization.named("bfloat16", kv="fp8"), Parallel(tp=4), "4xH100-SXM", free)
    assert small.decode_line(8, 8e3).slope == pytest.approx(full.decode_line(8, 8e3).slope / 2)


def test_experts_are_read_as_they_are_met() -> None:
    source = roofline("Qwen/Qwen3-30B-A3B", "H100-SXM", **FREE)
    device, model = source.cluster.device, load("Qwen/Qwen3-30B-A3B").model
    one = source.step_seconds(Steps.of(contexts=[1]))
    assert one < 1.3 * 2 * model.active_params / device.bandwidth / 0.9
    many = source.step_seconds(Steps.of(contexts=[1] * 256))
    assert many > 0.9 * 2 * (model.params - 2 * model.embedding) / device.bandwidth / 0.9


def test_swiftkv_halves_prefill_and_leaves_decode() -> None:
    model, quant = load("Qwen/Qwen3-8B").model, Quantization()
    base, swift = (built(each, quant, None, "H100-SXM") for each in (model, with_swiftkv(model, 18)))
    alone = built(prefill_only(with_swiftkv(model, 18)), quant, None, "H100-SXM")
    prompt, decode = Steps.of(chunks=[(4096, 0)]), Steps.of(contexts=[1000] * 8)
    assert 0.5 < swift.step_seconds(prompt) / base.step_seconds(prompt) < 0.62
    assert alone.step_seconds(prompt) < swift.step_seconds(prompt)
    assert swift.step_seconds(decode) == pytest.approx(base.step_seconds(decode), rel=0.03)


def test_windows_bound_attention() -> None:
    source = roofline("openai/gpt-oss-20b", "H100-SXM", **FREE)
    short, long = source.decode_line(16, 16 * 60.0), source.decode_line(16, 16 * 60_000.0)
    assert long.slope == pytest.approx(short.slope / 2)


def test_what_is_outside_is_counted_or_refused() -> None:
    source = roofline("Qwen/Qwen3-0.6B", "L40S")
    big = Steps.of(chunks=[(5000, 0)])
    edge = source.step_seconds(Steps(4096, 1, 0, big.prefill_pairs))
    assert source.step_seconds(big) == edge
    source.seconds(Steps.of(contexts=[1] * 600))
    assert source.describe()["outside"] == {
        "tokens": {"steps": 1, "furthest": 5000.0}, "sequences": {"steps": 1, "furthest": 600.0},
    }  # fmt: skip
    source.outside = Outside("refuse")
    with pytest.raises(SourceError, match="tokens 5000 is outside 0 to 4096"):
        source.step_seconds(big)


def test_plans_that_cannot_be() -> None:
    with pytest.raises(SourceError, match="needs 4 accelerators, there are 2"):
        roofline("Qwen/Qwen3-8B", "2xL40S", Parallel(tp=4))
    with pytest.raises(ModelError, match="cannot be cut"):
        roofline("Qwen/Qwen3-8B", "8xL40S", Parallel(tp=3))
    with pytest.raises(SourceError, match="efficiency of L40S: matmul"):
        roofline("Qwen/Qwen3-8B", "L40S", matmul=2)
    with pytest.raises(SourceError, match="has no encoder"):
        roofline("Qwen/Qwen3-8B", "L40S").encode_seconds([])


def test_encoding_grows_with_the_image() -> None:
    source = roofline("Qwen/Qwen2.5-VL-7B-Instruct", "H100-SXM")
    assert source.model.encoder is not None
    assert source.model.encoder.image is not None
    small, large = source.model.encoder.image(640, 480), source.model.encoder.image(1920, 1080)
    times = [source.encode_seconds(items) for items in ([small], [large], [large] * 4)]
    assert times[0] < times[1] < times[2] < 4 * times[1]
    # 16.3 TFLOP at three quarters of the peak.
    assert 0.02 < times[1] < 0.04
    assert source.encode_seconds([]) == 0
    assert source.encoder_output_bytes(large) == 2691 * 3584 * 2
