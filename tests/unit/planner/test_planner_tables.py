"""Measured tables: a small profile written here, and LLMServingSim's own in the data folder."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.hardware.collectives import Collectives
from vllm_suite.planner.models import Parallel, described, load
from vllm_suite.planner.sources.base import Outside, SourceError
from vllm_suite.planner.sources.efficiency import Efficiency
from vllm_suite.planner.sources.grid import Grid
from vllm_suite.planner.sources.roofline import FITTED, UNCALIBRATED, RooflineSource
from vllm_suite.planner.sources.skew import Skew
from vllm_suite.planner.sources.steps import Steps, pairs
from vllm_suite.planner.sources.tables import TableSource

DATA = Path(os.environ.get("VLLM_SUITE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
PERF = DATA / "llmservingsim" / "perf" / "RTXPRO6000"
MODELS = ("meta-llama/Llama-3.1-8B", "Qwen/Qwen3-32B")
needs_data = pytest.mark.skipif(not PERF.is_dir(), reason=f"no {PERF}; set VLLM_SUITE_DATA")

TINY = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 64}  # fmt: skip
SPARSE = TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
META = """
model: tiny
hardware: none
skew_fit:
  enabled: true
  bucket_axes:
    n_bins: [0, 2, 1000]
    n_labels: [few, many]
    skew_rate_bins: [-0.01, 0.5, 1.01]
    skew_rate_labels: [low, high]
    kv_big_bins: [0, 40, 1000000]
    kv_big_labels: [short, long]
    kp_bins: [-1, 0, 1000000]
    kp_labels: [none, some]
  per_tp: {1: {alpha_default: 0.5}}
"""


def write(path: Path, columns: str, rows: Iterator[tuple[object, ...]] | list[tuple[object, ...]]) -> None:
    """A CSV file."""
    path.write_text("\n".join([columns, *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Times that are linear in everything, so that every step's time is known."""
    folder = tmp_path / "tp1"
    folder.mkdir()
    (tmp_path / "meta.yaml").write_text(META)
    dense = {"embedding": 1, "layernorm": 2, "qkv_proj": 3, "rotary_emb": 4, "o_proj": 5, "gate_up_proj": 6,
             "act_fn": 7, "down_proj": 8, "final_layernorm": 9}  # fmt: skip
    write(folder / "dense.csv", "layer,tokens,time_us", [(k, n, v * n) for k, v in dense.items() for n in (1, 4, 100)])
    write(folder / "per_sequence.csv", "layer,sequences,time_us", [("lm_head", n, 10 + n) for n in (1, 8)])
    kv = (16, 32, 64)
    rows = [(0, 0, n, k, n * k) for n in (1, 2, 4) for k in kv]
    rows += [(c, p, 0, 0, c + p) for c in (16, 32) for p in (0, *kv)]
    rows += [(c, p, n, k, c + p + n * k) for c, p, n, k in product((16, 32), (0, *kv), (1, 2), kv)]
    write(folder / "attention.csv", "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us", rows)
    fit = [(0, "few", "low", "short", "none", 0.25), (16, "few", "low", "short", "none", 1.0),
           (32, "few", "low", "short", "none", 0.0)]  # fmt: skip
    write(folder / "skew_fit.csv", "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha", fit)
    return tmp_path


def fixed(tokens: int, sequences: int, layers: int = 3) -> float:
    """Microseconds of the profile's dense layers."""
    return tokens * (1 + 9 + layers * (2 * 2 + 3 + 4 + 5 + 6 + 7 + 8)) + 10 + sequences


def test_a_step_is_the_sum_of_its_layers(profile: Path) -> None:
    source = TableSource(profile, described(TINY, "tiny").model, Parallel())
    cases = {
        # 24 keys lie between 16 and 32.
        Steps.of(contexts=[24]): fixed(1, 1) + 3 * 24,
        Steps.of(chunks=[(20, 40)]): fixed(20, 1) + 3 * 60,
        Steps.of(chunks=[(20, 40)], contexts=[24, 24]): fixed(22, 3) + 3 * (60 + 48),
        # Less than was measured takes as long as the least.
        Steps.of(contexts=[3]): fixed(1, 1) + 3 * 16,
        # Contexts that differ: mean 20, longest 30, α 0.25 between their times.
        Steps.of(contexts=[10, 30]): fixed(2, 2) + 3 * (40 + 0.25 * (60 - 40)),
        # α between the chunks 16 and 32, whose prefix is none.
        Steps.of(chunks=[(20, 0)], contexts=[10, 30]): fixed(22, 3) + 3 * (20 + 40 + 0.75 * (60 - 40)),
        # No such bucket: the default of the fit.
        Steps.of(contexts=[10, 50]): fixed(2, 2) + 3 * (60 + 0.5 * (100 - 60)),
        Steps(): 0.0,
    }
    for steps, micros in cases.items():
        assert source.step_seconds(steps) * 1e6 == pytest.approx(micros), steps
    assert source.outside.counts == {}
    assert source.describe()["uncertainty"] == 0.05
    # Two prompts of 12 tokens have as many pairs as one of 16.8.
    two = Steps.of(chunks=[(12, 0), (12, 0)])
    assert pairs(two.prefill_tokens, 0) > two.prefill_pairs
    assert source.step_seconds(two) * 1e6 == pytest.approx(fixed(24, 2) + 3 * 17.17, abs=0.1)


def test_a_line_ends_where_the_share_changes(profile: Path) -> None:
    source = TableSource(profile, described(TINY, "tiny").model, Parallel())
    # The longest is 35, and above 40 α is another one.
    line = source.decode_line(2, 45, 35, 10)
    assert line.steps == 6
    for index in range(6):
        steps = Steps.of(contexts=[10 + index, 35 + index])
        assert line.seconds + index * line.slope == pytest.approx(source.step_seconds(steps))
    assert source.decode_line(2, 45).steps == pytest.approx(32 - 22.5 + 1)


def test_the_share_lies_between_numbers_of_sequences_that_were_measured(profile: Path) -> None:
    """Buckets to 2, to 4 and beyond: 3 lies half-way, 1 and 5 have no neighbour to lie between."""
    axes = yaml.safe_load(META)["skew_fit"]
    axes["bucket_axes"] |= {"n_bins": [0, 2, 4, 1000], "n_labels": ["two", "four", "more"]}
    fit = [(chunk, n, "low", "short", "none", share)
           for n, share in (("two", 0.2), ("four", 0.6), ("more", 0.8)) for chunk in (0, 16)]  # fmt: skip
    write(profile / "tp1" / "skew_fit.csv", "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha", fit)
    skew = Skew(profile / "tp1", axes, 1)
    numbers, shares = [1, 2, 3, 3.5, 4, 5, 99], [0.2, 0.2, 0.4, 0.5, 0.6, 0.8, 0.8]
    assert [skew.alpha(0, n, 0.1, 30, 0) for n in numbers] == pytest.approx(shares)
    other = np.zeros(len(numbers))
    assert skew.alphas(other + 8, np.array(numbers, float), other + 0.1, other + 30, other) == pytest.approx(shares)


def test_host_time_is_added(profile: Path) -> None:
    plain, with_host = (
        TableSource(profile, described(TINY, "tiny").model, Parallel(), step_us=a, sequence_us=b)
        for a, b in ((0, 0), (30, 5))
    )
    steps = Steps.of(contexts=[20, 20])
    assert with_host.step_seconds(steps) - plain.step_seconds(steps) == pytest.approx(40e-6)


def test_beyond_the_tables(profile: Path) -> None:
    source = TableSource(profile, described(TINY, "tiny").model, Parallel())
    assert source.step_seconds(Steps.of(contexts=[99])) * 1e6 == pytest.approx(fixed(1, 1) + 3 * 64)
    # Three sequences beside a prompt: the third costs what it costs in decode alone.
    mixed = Steps.of(chunks=[(16, 0)], contexts=[16] * 3)
    assert source.step_seconds(mixed) * 1e6 == pytest.approx(fixed(19, 4) + 3 * (16 + 48))
    # The same with contexts that differ: mean 20, longest 30, between 16 and 32 tokens of prompt α 0.75.
    uneven = Steps.of(chunks=[(20, 0)], contexts=[10, 20, 30])
    assert source.step_seconds(uneven) * 1e6 == pytest.approx(fixed(23, 4) + 3 * (20 + 60 + 0.75 * 2 * 10))
    assert source.outside.counts == {"kv_decode": 1, "n_decode beside a prompt": 2}
    assert source.outside.furthest["kv_decode"] == 99
    refusing = TableSource(profile, described(TINY, "tiny").model, Parallel(), outside=Outside("refuse"))
    for steps, axis in (
        (Steps.of(contexts=[99]), "kv_decode 99 is outside"),
        (mixed, "n_decode beside a prompt 3"),
        (Steps.of(contexts=[16] * 5), "n_decode 5"),
        (Steps.of(chunks=[(101, 0)]), "tokens 101"),
        (Steps.of(chunks=[(40, 0)]), "prefill_chunk 40"),
    ):
        with pytest.raises(SourceError, match=axis):
            refusing.step_seconds(steps)
        with pytest.raises(SourceError, match=axis):
            refusing.seconds(Steps(*([value] for value in steps)))


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        ("meta.yaml", "n_bins", "m_bins", "skew_fit is incomplete"),
        ("tp1/skew_fit.csv", "few", "lots", r"skew_fit\.csv:2: no bucket 'lots'"),
        ("tp1/dense.csv", "qkv_proj", "mystery", r"dense\.csv: layers that are not known: mystery"),
        ("tp1/dense.csv", "embedding,4,4", "embedding,x,4", r"dense\.csv:3: layer, tokens and time_us"),
        ("tp1/per_sequence.csv", "lm_head", "sampler", r"per_sequence\.csv: no layer lm_head"),
        ("tp1/attention.csv", "0,0,1,16,16", "0,0,1,16", r"attention\.csv:2: prefill_chunk"),
        ("tp1/attention.csv", "16,16,1,32,64\n", "", None),
        ("tp1/attention.csv", "32,64,2,64,224\n", "", "grid points cannot be filled in"),
    ],
)
def test_files_that_do_not_fit(profile: Path, file: str, old: str, new: str, says: str | None) -> None:
    path = profile / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    if says is None:
        assert TableSource(profile, described(TINY, "tiny").model, Parallel()).step_seconds(
            Steps.of([(16, 16)], [32])
        ) * 1e6 == pytest.approx(fixed(17, 2) + 3 * 64)
        return
    with pytest.raises(SourceError, match=says):
        TableSource(profile, described(TINY, "tiny").model, Parallel())


def test_what_tables_do_not_hold(profile: Path) -> None:
    tiny = described(TINY, "tiny").model
    with pytest.raises(SourceError, match="no tp2; there are tp1"):
        TableSource(profile, tiny, Parallel(2), collectives=Collectives(cluster("2xL40S")))
    with pytest.raises(SourceError, match="collectives over 2 ranks"):
        TableSource(profile, tiny, Parallel(2))
    with pytest.raises(SourceError, match="sliding windows"):
        TableSource(profile, load("openai/gpt-oss-20b").model, Parallel())
    with pytest.raises(SourceError, match="experts cut over ranks were not profiled"):
        TableSource(profile, described(SPARSE, "sparse").model, Parallel(2), collectives=Collectives(cluster("2xL40S")))
    with pytest.raises(SourceError, match=r"moe\.csv: No such file"):
        TableSource(profile, described(SPARSE, "sparse").model, Parallel())
    (profile / "tp1" / "moe.csv").write_text("ep,tokens,activated_experts,time_us\n4,1,1,1\n")
    with pytest.raises(SourceError, match="no rows for 1 expert-parallel ranks, nor for one"):
        TableSource(profile, described(SPARSE, "sparse").model, Parallel())


def test_experts_take_the_place_of_the_mlp(profile: Path) -> None:
    model, rows = described(SPARSE, "sparse").model, [(1, 2), (1, 4), (16, 2), (16, 4)]
    path = profile / "tp1" / "moe.csv"
    write(path, "tokens,activated_experts,time_us", [(n, e, 100 * e + n) for n, e in rows])
    source = TableSource(profile, model, Parallel())
    # One token reaches 2 of 4 experts, two reach 3 on average; the MLP's layers (6 + 7 + 8) are not run.
    for count, reached in ((1, 2), (2, 3), (4, 3.75)):
        dense = fixed(count, count) - 3 * 21 * count
        got = source.step_seconds(Steps.of(contexts=[16] * count)) * 1e6
        assert got == pytest.approx(dense + 3 * (16 * count + 100 * reached + count))
    assert source.max_tokens == 16
    # Four ranks of one expert each: 4 tokens of 2 assignments are 2 tokens of work on each rank of two.
    spread = Parallel(dp=2, ep=True)
    collectives = Collectives(cluster("2xL40S"))
    two = TableSource(profile, model, spread, collectives=collectives, imbalance=1.0)
    exchange = sum(
        3 * collectives.seconds(kind, 2 * 2 * 8 * 2, range(2)) for kind in ("all_gather", "reduce_scatter")
    )  # fmt: skip
    dense = fixed(2, 2) - 3 * 21 * 2
    reached = 2 * (1 - 0.5**4)
    expected = dense + 3 * (16 * 2 + 100 * max(2, reached) + 2)
    assert two.step_seconds(Steps.of(contexts=[16] * 2)) * 1e6 == pytest.approx(expected + exchange * 1e6)
    # 24 of 16 measured tokens on the busiest rank: half as long again as 16.
    even, busy = (
        TableSource(profile, model, spread, collectives=collectives, imbalance=each).step_seconds(Steps.of([(16, 0)]))
        for each in (1.0, 1.5)
    )
    assert (busy - even) * 1e6 == pytest.approx(3 * 0.5 * (100 * 2 + 16), rel=1e-3)
    # Measured at that spread: all four tokens are counted.
    path.write_text("ep,tokens,activated_experts,time_us\n2,4,1,500\n2,4,2,700\n2,8,2,900\n")
    two = TableSource(profile, model, spread, collectives=collectives, imbalance=1.0)
    expected = dense + 3 * (16 * 2 + 500 + (reached - 1) * 200)
    assert two.step_seconds(Steps.of(contexts=[16] * 2)) * 1e6 == pytest.approx(expected + exchange * 1e6)
    assert two.max_tokens == 4


def test_a_pipeline_hands_rows_on(profile: Path) -> None:
    collectives, model = Collectives(cluster("3xL40S")), described(TINY, "tiny").model
    one, three = (
        TableSource(profile, model, Parallel(pp=pp), collectives=collectives) for pp in (1, 3)
    )  # fmt: skip
    steps = Steps.of(chunks=[(20, 0)])
    handed = 2 * collectives.seconds("p2p", 20 * 2 * 8 * 2, range(2))
    assert three.step_seconds(steps) - one.step_seconds(steps) == pytest.approx(handed)
    assert three.stage_seconds(steps) == three.step_seconds(steps) / 3


def test_a_grid_of_two_grids_keeps_every_point() -> None:
    def value(x: float, y: float) -> float:
        return 3 * x + x * y

    points = {*product((0, 4, 8), (0, 4, 8)), *product((0, 2, 8), (0, 6, 8))}
    grid = Grid.of_rows(np.array([(x, y, value(x, y)) for x, y in sorted(points)], dtype=float))
    for x, y in product((0, 1, 2, 5, 8), (0, 3, 6, 8)):
        assert grid.at(x, y) == pytest.approx(value(x, y))
    whole = grid.whole(0)
    assert list(whole.axes[0]) == list(range(9))
    assert whole.at(3, 5.5) == pytest.approx(value(3, 5.5))
    assert grid.line(2, 1).slope == pytest.approx(2)
    assert grid.line(2, 1).ahead == 4
    assert grid.at(99, -5) == value(8, 0)


@cache
def source_of(name: str, tp: int) -> TableSource:
    """A source of the data folder."""
    collectives = Collectives(cluster(f"{tp}xRTX-PRO-6000"))
    return TableSource(PERF / name / "bf16", load(name).model, Parallel(tp), collectives=collectives)


def rows_of(name: str, tp: int) -> list[tuple[int, int, int, int, float]]:
    """The measured attention."""
    with (PERF / name / "bf16" / f"tp{tp}" / "attention.csv").open() as file:
        return [(*map(int, row[:4]), float(row[4])) for row in list(csv.reader(file))[1:]]  # type: ignore[misc]


@needs_data
@pytest.mark.parametrize("name", MODELS)
def test_measured_points_come_back(name: str) -> None:
    """A third of the measured attention times, and a whole step at measured sizes."""
    source = source_of(name, 1)
    table = source.attention
    for chunk, before, count, context, micros in rows_of(name, 1)[::3]:
        if chunk and count:
            got = table.both.at(chunk, before, count, context)
        else:
            got = table.prefill.at(chunk, before) if chunk else table.decode.at(count, context)
        assert got * 1e6 == pytest.approx(micros, rel=1e-9)
    layers = len(load(name).model.layers)
    dense = 0.0
    with (PERF / name / "bf16" / "tp1" / "dense.csv").open() as file:
        for row in csv.DictReader(file):
            if row["tokens"] == "64":
                once = row["layer"] in ("embedding", "final_layernorm")
                dense += float(row["time_us"]) * (1 if once else layers * (2 if row["layer"] == "layernorm" else 1))
    with (PERF / name / "bf16" / "tp1" / "per_sequence.csv").open() as file:
        dense += sum(float(row["time_us"]) for row in csv.DictReader(file) if row["sequences"] == "64")
    attention = next(row[4] for row in rows_of(name, 1) if row[:4] == (0, 0, 64, 1024))
    got = source.step_seconds(Steps.of(contexts=[1024] * 64))
    assert got * 1e6 == pytest.approx(dense + layers * attention, rel=1e-9)


@needs_data
def test_between_points_it_lies_between_them() -> None:
    table = source_of(MODELS[0], 1).attention
    random.seed(0)
    for grid in (table.prefill, table.decode, table.both):
        for _ in range(200):
            place = [random.randrange(len(axis) - 1) for axis in grid.axes]
            point = [random.uniform(axis[at], axis[at + 1]) for axis, at in zip(grid.axes, place, strict=True)]
            corners = grid.values[tuple(slice(at, at + 2) for at in place)]
            assert corners.min() - 1e-12 <= grid.at(*point) <= corners.max() + 1e-12


@needs_data
def test_points_left_out_are_predicted() -> None:
    """The profile's second, finer grid from its first one: what interpolation costs, in time of one kernel."""
    rows = [row for row in rows_of(MODELS[0], 1) if row[0] and row[2]]
    powers = {16 * 2**i for i in range(11)} | {0}
    coarse = [row for row in rows if {row[0], row[1], row[3]} <= powers]
    grid = Grid.of_rows(np.array(coarse, dtype=float))
    left = [row for row in rows if row[0] not in powers and row[0] < 2048]
    errors = np.array([grid.at(*row[:4]) / row[4] - 1 for row in left])
    assert len(left) > 5000
    assert np.median(np.abs(errors)) < 0.02
    assert np.percentile(np.abs(errors), 90) < 0.1
    assert abs(errors.mean()) < 0.01


@needs_data
@pytest.mark.parametrize(("name", "tp"), [(MODELS[0], 1), (MODELS[1], 2)])
def test_one_step_arrays_and_lines_agree(name: str, tp: int) -> None:
    source = source_of(name, tp)
    random.seed(3)
    steps = [
        Steps.of(
            [(random.randint(1, 300), random.choice([0, 500])) for _ in range(random.randint(0, 3))],
            [random.randint(1, 4000) for _ in range(random.randint(0, 120))],
        )
        for _ in range(100)
    ]
    together = source.seconds(Steps(*(np.array(column) for column in zip(*steps, strict=True))))
    assert together == pytest.approx([source.step_seconds(each) for each in steps], rel=1e-9)
    for contexts in ([700] * 20, [100, 900, 1100], [5], [30] * 128):
        line = source.decode_line(len(contexts), sum(contexts), max(contexts), min(contexts))
        assert line.steps >= 1
        for index in range(min(int(line.steps), 300)):
            step = source.step_seconds(Steps.of(contexts=[each + index for each in contexts]))
            assert line.seconds + line.slope * index == pytest.approx(step, rel=1e-9), (contexts, index)


def steps_of_all_kinds(count: int, seed: int) -> list[Steps]:
    """Decode alone, prompts alone and both in turn, over the range of the tables."""
    draw, found = random.Random(seed), []
    for index in range(count):
        contexts = [int(2 ** draw.uniform(5, 12.5))] * int(2 ** draw.uniform(0, 7))
        chunk = (int(2 ** draw.uniform(4, 11)), draw.choice([0, 0, int(2 ** draw.uniform(6, 12))]))
        beside = (min(chunk[0], 2048 - len(contexts)), chunk[1])
        found.append((Steps.of(contexts=contexts), Steps.of([chunk]), Steps.of([beside], contexts))[index % 3])
    return found


@needs_data
@pytest.mark.parametrize(("name", "tp", "plain", "fitted"), [(MODELS[0], 1, 0.07, 0.04), (MODELS[1], 1, 0.1, 0.06)])
def test_the_roofline_is_near_the_tables(name: str, tp: int, plain: float, fitted: float) -> None:
    """With default constants, and with the device's, which were fitted to the first model and to nothing of the second.

    Mean error of a step's kernels, and nine of ten steps within what the source reports.
    """
    loaded, found, cases = load(name), cluster("RTX-PRO-6000"), steps_of_all_kinds(150, seed=7)
    columns = Steps(*(np.array(column) for column in zip(*cases, strict=True)))
    measured = source_of(name, tp).seconds(columns)
    bare = {"step_us": 0, "sequence_us": 0}
    for efficiency, mean, claimed in (
        (Efficiency(**bare), plain, UNCALIBRATED),
        (Efficiency.of(found.device, **bare), fitted, FITTED),
    ):
        source = RooflineSource(
            loaded.model, loaded.stored, Parallel(), found, efficiency=efficiency, max_tokens=2048, max_sequences=256
        )
        errors = np.abs(source.seconds(columns) / measured - 1)
        assert errors.mean() < mean, errors.mean()
        # Two thirds are what is claimed.
        assert np.percentile(errors, 67) < claimed.relative
    assert source.uncertainty is FITTED
