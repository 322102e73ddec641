"""The parts of a roofline step: collectives, experts, latent attention, encoders cut or dealt out."""

from __future__ import annotations

import pytest

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.hardware.collectives import Collectives
from vllm_suite.planner.models import Parallel, load
from vllm_suite.planner.sources.efficiency import Efficiency
from vllm_suite.planner.sources.roofline import RooflineSource
from vllm_suite.planner.sources.steps import Steps

BARE = {"step_us": 0, "sequence_us": 0, "kernel_us": 0}


def source(name: str, hardware: str, parallel: Parallel, busy: float = 0.7, **changes: float) -> RooflineSource:
    """A small one without constants."""
    found, loaded = cluster(hardware), load(name)
    efficiency = Efficiency.of(found.device, **{**BARE, **changes})
    return RooflineSource(
        loaded.model, loaded.stored, parallel, found,
        efficiency=efficiency, collectives=Collectives(found, busy=busy), max_tokens=1024, max_sequences=64,
    )  # fmt: skip


@pytest.mark.parametrize("pp", [1, 2])
def test_collectives_of_a_step(pp: int) -> None:
    """Two all-reduces a layer and one of the embedding, a gather of the logits, hidden and residual between stages."""
    quick, slow = (source("Qwen/Qwen3-32B", "8xH100-SXM", Parallel(tp=4, pp=pp), busy) for busy in (0.8, 0.1))
    steps, row = Steps.of([(512, 0)], [100] * 8), 5120 * 2

    def exchanged(busy: float) -> float:
        found = Collectives(cluster("8xH100-SXM"), busy=busy)
        reduce = (2 * 64 + 1) * found.seconds("all_reduce", 520 * row, range(4))
        between = (pp - 1) * found.seconds("p2p", 520 * 2 * row, range(2))
        return reduce + between + found.seconds("all_gather", 9 * 151_936 * 2, range(4))

    difference = slow.step_seconds(steps) - quick.step_seconds(steps)
    assert difference == pytest.approx(exchanged(0.1) - exchanged(0.8), rel=1e-6)


def test_experts_over_data_parallel_ranks_gather_and_scatter() -> None:
    quick, slow = (
        source("Qwen/Qwen3-30B-A3B", "4xH100-SXM", Parallel(tp=2, dp=2, ep=True), busy) for busy in (0.8, 0.1)
    )
    steps, row = Steps.of([(512, 0)]), 2048 * 2

    def exchanged(busy: float) -> float:
        found = Collectives(cluster("4xH100-SXM"), busy=busy)
        reduce = (48 + 1) * found.seconds("all_reduce", 512 * row, range(2))
        moved = sum(found.seconds(kind, 2 * 512 * row, range(4)) for kind in ("all_gather", "reduce_scatter"))
        return reduce + 48 * moved + found.seconds("all_gather", 151_936 * 2, range(2))

    difference = slow.step_seconds(steps) - quick.step_seconds(steps)
    assert difference == pytest.approx(exchanged(0.1) - exchanged(0.8), rel=1e-6)


def test_the_busiest_rank_of_experts_decides() -> None:
    even, uneven = (
        source("mistralai/Mixtral-8x7B-v0.1", "4xH100-SXM", Parallel(tp=4, ep=True), imbalance=share, half_rows=0)
        for share in (1.0, 3.0)
    )
    steps = Steps.of([(1024, 0)])
    # Each rank has a quarter of 1024 x 2 rows, in the worst case three times that, through 3 x 4096 x 14336 weights.
    rows = 1024 * 2 / 4
    each = 2 * rows * 3 * 4096 * 14_336 / (989.4e12 * even.efficiency.matmul)
    more = uneven.step_seconds(steps) - even.step_seconds(steps)
    # At 256 rows an expert, the even case waits for its weights.
    assert 1.5 * 32 * each < more < 2.0 * 32 * each


def test_latent_attention() -> None:
    peak, bandwidth = 989.4e12, 4.8e12
    # Each head scores 512 + 64 values and sums 512. With 128 heads on a rank that decides; with 16, reading the row of
    # 576 values in 16 bits takes longer.
    for parallel, decides in ((Parallel(), "scores"), (Parallel(tp=8, pp=2), "read")):
        found = source("deepseek-ai/DeepSeek-V3", "16xH200", parallel)
        scores = 2 * 128 / parallel.tp * (2 * 512 + 64) / (peak * found.efficiency.prefill_attention)
        read = 576 * 2 / (bandwidth * found.efficiency.decode_attention)
        assert (scores > read) == (decides == "scores")
        assert found.decode_line(4, 4000.0).slope == pytest.approx(4 * 61 * max(scores, read))
    # A chunk after a prefix multiplies its rows out again: 512 to 16 heads of 128 keys and 128 values.
    unpack = 2 * 512 * 16 * 256 / (peak * found.efficiency.matmul)
    more = found.step_seconds(Steps.of([(1, 50_000)])) - found.step_seconds(Steps.of([(1, 0)]))
    assert more == pytest.approx(61 * 50_000 * (read + unpack), rel=1e-3)


def test_query_heads_that_are_not_packed_beside_prompts() -> None:
    """Qwen3-32B has eight query heads for each KV head."""
    packed, anew = (source("Qwen/Qwen3-32B", "H100-SXM", Parallel(), reread=share) for share in (0.0, 0.5))
    key = packed.decode_line(4, 4000.0).slope / 4
    assert anew.decode_line(4, 4000.0).slope / 4 == key
    beside = [each.step_seconds(Steps.of([(16, 0)], [1000] * 4)) for each in (packed, anew)]
    assert beside[1] - beside[0] == pytest.approx(4000 * key * 7 * 0.5)


def test_an_encoder_is_cut_or_dealt_out() -> None:
    cut, dealt = (
        source("Qwen/Qwen2.5-VL-7B-Instruct", "4xH100-SXM", Parallel(tp=4, encoder_data=data)) for data in (False, True)
    )
    assert cut.model.encoder is not None
    assert cut.model.encoder.image is not None
    image = cut.model.encoder.image(1024, 1024)
    one, four, five, eight = (dealt.encode_seconds([image] * count) for count in (1, 4, 5, 8))
    # Four images take as long as one, five as long as eight.
    assert one == pytest.approx(four)
    assert five == pytest.approx(eight)
    assert eight == pytest.approx(2 * four, rel=1e-6)
    assert cut.encode_seconds([image]) == pytest.approx(one / 4, rel=1e-6)
