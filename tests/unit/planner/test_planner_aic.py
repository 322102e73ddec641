"""The source `aic`: beside AIConfigurator's own engine, its three ways of asking, its limits, and measured vLLM 0.6.

AIConfigurator is in the environment of optional tools: where it is not importable, the last test runs this file there.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from evaluation import PYTHON

from vllm_suite.planner.models import Parallel, Quantization, load
from vllm_suite.planner.sources.aic import AicSource
from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import Outside, SourceError
from vllm_suite.planner.sources.steps import Steps

HERE = importlib.util.find_spec("aiconfigurator_core") is not None
needed = pytest.mark.skipif(not HERE, reason="runs where AIConfigurator is, by the last test of this file")
DATA = Path(os.environ.get("VLLM_SUITE_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
LLAMA = "meta-llama/Llama-3.1-70B"


@pytest.fixture(scope="module")
def tables() -> AicTables:
    return AicTables.of("H100-SXM")


def source(tables: AicTables, name: str = LLAMA, parallel: Parallel | None = None, **more: object) -> AicSource:
    model, quant = load(name)
    return AicSource(model, quant, parallel or Parallel(tp=4), tables, max_tokens=4096, **more)  # type: ignore[arg-type]


# Ours, AIConfigurator's name, cut, its arguments, and how far steps may be apart.
MODELS = [
    (LLAMA, "meta-llama/Meta-Llama-3.1-70B", Parallel(tp=2), {}, 0.025),
    (LLAMA, "meta-llama/Meta-Llama-3.1-70B", Parallel(tp=8), {}, 0.01),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B", Parallel(), {}, 0.02),
    ("Qwen/Qwen3-32B", "Qwen/Qwen3-32B", Parallel(tp=4), {}, 0.03),
    ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", Parallel(tp=2), {"moe_tp_size": 2, "moe_ep_size": 1}, 0.01),
    ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", Parallel(tp=4, ep=True), {"moe_tp_size": 1, "moe_ep_size": 4}, 0.02),
    # It lets shared experts run beside the others in decode; here they follow one another.
    ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3", Parallel(tp=8), {"moe_tp_size": 8, "moe_ep_size": 1}, 0.26),
]


@needed
@pytest.mark.parametrize(("name", "theirs", "parallel", "more", "apart"), MODELS)
def test_steps_are_those_of_aiconfigurators_engine(
    tables: AicTables, name: str, theirs: str, parallel: Parallel, more: dict[str, int], apart: float
) -> None:
    engines = importlib.import_module("aiconfigurator_core.sdk.engine")
    logging.disable(logging.CRITICAL)  # It says at every start that it is deprecated.
    try:
        engine = engines.EngineHandle.compile(
            theirs, "h100_sxm", "vllm", backend_version="0.24.0", tp_size=parallel.tp, **more
        )
        ours = source(tables, name, parallel)
        found = []
        for count, context in ((1, 111), (16, 1000), (64, 4250)):
            their = sum(each[1] for each in engine.decode_step_per_op(count, context - 1, 2))
            found.append(ours.step_seconds(Steps.of(contexts=[context] * count)) * 1e3 / their - 1)
        for prompt in (74, 512, 4000):
            context_ops, _ = engine.run_static_per_op(batch_size=1, isl=prompt, osl=2)
            their = sum(each[1] for each in context_ops)
            found.append(ours.step_seconds(Steps.of(chunks=[(prompt, 0)])) * 1e3 / their - 1)
    finally:
        logging.disable(logging.NOTSET)
    assert max(map(abs, found)) < apart, found


@needed
@pytest.mark.parametrize("name", [LLAMA, "google/gemma-3-27b-it"])
def test_three_ways_of_asking_agree(tables: AicTables, name: str) -> None:
    ours = source(tables, name, step_us=100.0, sequence_us=3.0, prompt_all_reduce="eager")
    random = np.random.default_rng(1)
    steps = [Steps()]
    for _ in range(60):
        chunks = [(int(random.integers(1, 900)), int(random.integers(0, 5000))) for _ in range(random.integers(0, 4))]
        contexts = random.integers(1, 6000, random.integers(0, 60)).tolist()
        steps.append(Steps.of(chunks, contexts))
    columns = Steps(*(np.array(column, dtype=float) for column in zip(*steps, strict=True)))
    single = [ours.step_seconds(each) for each in steps]
    assert single[0] == 0.0
    np.testing.assert_allclose(ours.seconds(columns), single, rtol=1e-12)
    for count, context in ((1, 3), (7, 900 * 7), (33, 1020 * 33)):
        line, at = ours.decode_line(count, context), 0
        assert line.steps >= 1
        for at in {0, 1, int(min(line.steps, 40)) - 1}:
            expected = ours.step_seconds(Steps(decode_sequences=count, decode_context=context + at * count))
            assert line.seconds + line.slope * at == pytest.approx(expected, rel=1e-12)


@needed
def test_host_times_and_all_reduce(tables: AicTables) -> None:
    decode, prompt = Steps.of(contexts=[500] * 8), Steps.of(chunks=[(300, 0), (200, 0)])
    bare, host = source(tables), source(tables, step_us=4000.0, sequence_us=10.0, request_us=9000.0)
    assert host.step_seconds(decode) - bare.step_seconds(decode) == pytest.approx(4.08e-3)
    assert host.step_seconds(prompt) - bare.step_seconds(prompt) == pytest.approx(4.02e-3)
    assert host.request_s == 9e-3
    assert (host.host_seconds(8), bare.host_seconds(8)) == (pytest.approx(4.08e-3), 0.0)
    assert host.describe()["step_us"] == pytest.approx(4000.0)
    # 161 reductions of 8 MB on four H100, 14.7 us apart in the table; decode is left as it is.
    eager = source(tables, prompt_all_reduce="eager")
    assert eager.step_seconds(decode) == bare.step_seconds(decode)
    apart = (eager.step_seconds(prompt) - bare.step_seconds(prompt)) / 161
    assert 5e-6 < apart < 20e-6
    nccl = source(tables, all_reduce="nccl").products
    # 65 MB on two H100 take about 0.25 ms by NCCL: its table counts values of two bytes.
    assert nccl.collective("all_reduce", np.array([2.0**26]), 2, "nccl")[0] == pytest.approx(2.53e-4, rel=0.01)
    assert nccl.collective("all_reduce", np.array([2.0**26]), 1, "nccl")[0] == 0.0


@needed
def test_a_chunk_after_others_costs_its_share(tables: AicTables) -> None:
    ours = source(tables)
    whole = ours.step_seconds(Steps.of(chunks=[(4096, 0)]))
    kernel = ours._attention[0][1]
    full, halves = (
        kernel.prompt_seconds(4096, 1, 0, 4096 * 4097 / 2),
        [kernel.prompt_seconds(2048, 1, before, 2048 * before + 2048 * 2049 / 2) for before in (0, 2048)],
    )
    assert halves[1] > 2 * halves[0]
    assert halves[1] == pytest.approx(full * (1 - (2048 * 2049) / (4096 * 4097)), rel=1e-9)
    # Two chunks cost more than one: launches and less efficient products.
    parts = sum(ours.step_seconds(Steps.of(chunks=[(2048, before)])) for before in (0, 2048))
    assert parts > whole * 0.95


@needed
def test_more_than_was_measured_is_counted_or_refused(tables: AicTables) -> None:
    ours = source(tables)
    long = Steps.of(contexts=[200_000])
    assert ours.step_seconds(long) > ours.step_seconds(Steps.of(contexts=[131_072]))
    ours.step_seconds(Steps.of(chunks=[(5000, 0)]))
    found = ours.describe()["outside"]
    assert found["context"]["furthest"] == 200_000
    assert found["tokens"]["furthest"] == 5000
    strict = source(tables, outside=Outside("refuse"))
    with pytest.raises(SourceError, match="context 200000 is outside"):
        strict.step_seconds(long)


@needed
def test_what_was_not_measured_is_named(tables: AicTables) -> None:
    with pytest.raises(SourceError, match=r"no AIConfigurator tables for RTX-4090; there are .*h100_sxm"):
        AicTables.of("RTX-4090")
    with pytest.raises(SourceError, match=r"vllm 0\.6\.0 was not measured; there are 0\.24\.0"):
        AicTables.of("H200", version="0.6.0")
    model, _ = load(LLAMA)
    for named, text in ((Quantization(weights="int4"), "int4"), (Quantization(kv="int8"), "int8")):
        with pytest.raises(SourceError, match=text):
            AicSource(model, named, Parallel(tp=4), tables, max_tokens=64)
    products = source(tables).products
    with pytest.raises(SourceError, match="experts 8 of 4096 x 14336, 2 used, bf16, cut 3 ways"):
        products.experts("bf16", np.ones(2), hidden=4096, inner=14336, used=2, experts=8, slices=3, spread=1,
                         distribution="balanced")  # fmt: skip
    with pytest.raises(SourceError, match="all_reduce over 3 ranks"):
        products.collective("all_reduce", np.ones(1), 3, "graph")


@needed
def test_versions_of_the_tables_are_reported(tables: AicTables) -> None:
    ours = source(tables)
    found = ours.describe()
    assert found["source"] == f"aic {ours.model.name} on h100_sxm, vllm 0.24.0, core 0.12.0"
    assert found["tables"] == {"gemm": "0.24.0", "comm": "0.24.0", "attention": "0.24.0"}
    assert 0 < found["uncertainty"] < 1
    assert source(tables, step_us=1.0).uncertainty.relative < ours.uncertainty.relative


@needed
def test_measured_vllm_06_on_eight_h100() -> None:
    from vllm_suite.planner.validation import apex_measured

    if not (DATA / "measured" / "vllm_8xH100_llama70b.csv").is_file():
        pytest.skip(f"no measured/vllm_8xH100_llama70b.csv in {DATA}; set VLLM_SUITE_DATA")
    step, request = apex_measured.fit(DATA)
    assert step == pytest.approx(apex_measured.STEP_US, abs=1.0)
    assert request == pytest.approx(apex_measured.REQUEST_US, abs=1.0)
    found = list(apex_measured.checks(DATA))
    assert [each.id for each in found] == ["A2", "A3", "A4", "A4", "A4", "A4"]
    assert [each for each in found if each.verdict != "holds"] == []


HEAD = "engine,model,trace,plan,ttft_ms,tpot_ms,e2e_mean_s,clean"


@needed
def test_other_models_and_engines_of_those_runs(tmp_path: Path) -> None:
    """Mistral-Large in 8 bits, dealt out and from traces of its own; what is no case is counted."""
    from vllm_suite.planner.validation import apex_measured
    from vllm_suite.planner.validation.apex_rows import SERVED, rows

    (traces := tmp_path / "measured" / "apex_traces").mkdir(parents=True)
    lines = [
        {"StartTimeOffset": number * 2 * 10**9, "ContextTokens": 100, "GeneratedTokens": 50} for number in range(6)
    ]
    (traces / "mistral_new.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (traces / "mistral_new_2DP4TP_fp8_1.jsonl").write_text("\n".join(map(json.dumps, lines[:2])))
    mistral = "vllm-0.6.0,Mistral-Large-Instruct-2407 fp8,new"
    table = [
        HEAD,
        f"{mistral},8TP_fp8,40,15,0.8,True",
        f"{mistral},2DP4TP_fp8_0,40,15,0.8,True",
        f"{mistral},2DP4TP_fp8_1,40,15,0.8,True",
        f"{mistral},4DP2TP_fp8_0,40,15,0.8,False",
        "vllm-0.6.0,Mistral-Large-Instruct-2407 fp8,old,8TP_fp8,40,15,0.8,True",
        "sglang-0.4.5,Mixtral-8x22B,new,8TP,40,15,0.8,True",
    ]
    (tmp_path / "measured" / "vllm_8xH100_mistral.csv").write_text("\n".join(table))
    found = rows(tmp_path)
    assert [(row.kind, row.tp, row.engine) for row in found.found] == [
        ("8TP", 8, 0),
        ("2DP4TP", 4, 0),
        ("2DP4TP", 4, 1),
    ]
    assert [len(row.requests(tmp_path) or ()) for row in found.found] == [6, 3, 2]
    assert list(found.left_out.values()) == [1, 1]
    checks = list(apex_measured.checks(tmp_path))
    assert [(each.id, each.verdict == "not run") for each in checks] == [
        ("A2", False), ("A3", False), ("A2", True), ("A2", True)
    ]  # fmt: skip
    assert "3 clean rows of Mistral-Large" in checks[0].what
    # Half the bytes of a model of 1.7 times the size: faster than Llama in 16 bits would be by its parameters alone.
    sources = apex_measured.aic_sources(0.0)
    decode = Steps.of(contexts=[500])
    assert 0.8 < sources(SERVED[1], 4).step_seconds(decode) / sources(SERVED[0], 4).step_seconds(decode) < 1.3


@needed
def test_a_closed_loop_at_aiconfigurators_batch(tables: AicTables) -> None:
    from vllm_suite.planner.validation.aic import alone, by_its_rules, closed_loop
    from vllm_suite.planner.validation.aic_answer import read

    path = DATA / "measured" / "aiconfigurator" / "qwen3-32b_h200_vllm_8g.txt"
    if not path.is_file():
        pytest.skip(f"no {path}; set VLLM_SUITE_DATA")
    answer = read(path)
    assert (answer.isl, answer.osl, answer.ttft, answer.tpot, answer.winner) == (4000, 500, 1000.0, 30.0, "agg")
    best, two = answer.rows["agg"][0], answer.rows["disagg"][0]
    assert best.engines == ((2, 4, 64),)
    assert two.engines == ((4, 1, 1), (1, 4, 120))
    assert two.plan.name == "4 prefill | 1 decode tp4"
    model, quant = load("Qwen/Qwen3-32B")
    own = AicTables.of("H200")
    engines = {tp: AicSource(model, quant, Parallel(tp=tp), own, max_tokens=8192) for tp in (1, 4)}
    ttft, tpot = closed_loop(engines[4], 64, 4000, 500)
    assert tpot == pytest.approx(best.tpot, rel=0.05)
    assert ttft + 0.8 * 64 == pytest.approx(best.ttft, rel=0.05)
    ttft, tpot = alone(engines[1], engines[4], two, 4000, 500)
    assert ttft * 1.1 * 1.8 == pytest.approx(two.ttft, rel=0.02)
    assert tpot * 1.08 == pytest.approx(two.tpot, rel=0.02)
    # By its own rules prefill is what limits two pools: 4 prompts a time, times 0.9 / 1.1, and one pool gives more.
    ours = by_its_rules(two, engines.__getitem__, answer, 64)
    assert ours == pytest.approx(two.tokens, rel=0.02)
    assert by_its_rules(best, engines.__getitem__, answer, 64) == pytest.approx(best.tokens, rel=0.03)
    assert by_its_rules(two, engines.__getitem__, replace(answer, ttft=700.0), 64) == 0.0


@needed
def test_an_encoder_beside_aiconfigurators(tmp_path: Path) -> None:
    from vllm_suite.planner.sources.aic_encoder import AicEncoder

    engines, package = (importlib.import_module(f"aiconfigurator_core{end}") for end in (".sdk.engine", ""))
    bundled = Path(str(package.__file__)).parent / "model_configs" / "Qwen--Qwen3-VL-32B-Thinking_config.json"
    (tmp_path / "config.json").write_text(bundled.read_text())
    model, quant = load(tmp_path)
    own = AicTables.of("H200")
    ours = AicEncoder(model, quant, Parallel(), own)
    theirs = "Qwen/Qwen3-VL-32B-Thinking"
    logging.disable(logging.CRITICAL)
    try:
        engine = engines.EngineHandle.compile(theirs, "h200_sxm", "vllm", backend_version="0.24.0", tp_size=1)
        settings = engines.build_model_config(tp_size=1, pp_size=1, attention_dp_size=1, moe_tp_size=1, moe_ep_size=1)
        listed = engines.build_ops_json(engines.get_model(theirs, settings, "vllm").encoder_ops)
        assert model.encoder is not None
        assert model.encoder.image is not None
        cost = model.encoder.image(1920, 1080)
        for count in (1, 4):
            parts = engine.evaluate_ops_json(listed, is_context=True, batch_size=count, s=cost.patches)
            tower = sum(each[1] for each in parts if "projector" not in each[0])
            # The projector is left out: it sees a quarter of the rows, which that call does not know.
            projector = ours._rows(ours.output, ours.tower.projector // ours.output, float(count * cost.tokens))
            assert (ours.seconds([cost] * count) - projector) * 1e3 == pytest.approx(tower, rel=0.02)
            assert projector < 0.05 * ours.seconds([cost] * count)
    finally:
        logging.disable(logging.NOTSET)
    assert ours.seconds([]) == 0.0
    beside = AicSource(model, quant, Parallel(), own, max_tokens=16, step_us=500.0)
    assert beside.encode_seconds([cost]) - 5e-4 == pytest.approx(ours.seconds([cost]))
    # Four pictures dealt out over four ranks take as long as one.
    dealt = AicEncoder(model, quant, Parallel(tp=4, encoder_data=True), own)
    cut = AicEncoder(model, quant, Parallel(tp=4), own)
    assert dealt.seconds([cost] * 4) == pytest.approx(ours.seconds([cost]))
    assert ours.seconds([cost]) / 4 < cut.seconds([cost]) < ours.seconds([cost])
    with pytest.raises(SourceError, match="has no encoder"):
        AicEncoder(*load(LLAMA), Parallel(), own)
    with pytest.raises(SourceError, match="encoder's attention of 25 heads of 128 was not measured"):
        AicEncoder(*load("OpenGVLab/InternVL2-26B"), Parallel(), own)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_suite.planner.sources.aic_tables.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"pip install 'vllm-suite\[aic\]'"):
        AicTables.of("H100-SXM")


@pytest.mark.skipif(HERE, reason="they ran in this process")
def test_the_others_where_aiconfigurator_is() -> None:
    found = PYTHON is not None and subprocess.run(
        [str(PYTHON), "-c", "import aiconfigurator_core"], capture_output=True, check=False
    )
    if not found or found.returncode:
        pytest.skip("AIConfigurator is not installed; run `make setup`, or pip install 'vllm-suite[aic]'")
    here = Path(__file__)
    files = [here, *here.parent.glob("test_planner_apex_engine.py")]
    command = [str(PYTHON), "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parents[3], check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
