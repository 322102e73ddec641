"""Options of `vllm-suite plan`: sources, pictures, APEX's schemes, and a time limit that the report keeps to."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_suite.cli.main import main
from vllm_suite.cli.plan import add_arguments
from vllm_suite.fleet.files import load_fleet
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Parallel, load
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.report import question as asking
from vllm_suite.planner.report import study as studying
from vllm_suite.planner.report.command import FOR_SEARCH, found_by, listing, space_of, timed
from vllm_suite.planner.report.fleet import fleet_of
from vllm_suite.planner.report.question import question
from vllm_suite.planner.report.text import report
from vllm_suite.planner.search.case import What
from vllm_suite.planner.search.search import Effort
from vllm_suite.planner.search.sources import Sources, encoder_maker, item_cost, profile, source_maker
from vllm_suite.planner.search.state import State
from vllm_suite.planner.search.workers import OutOfTime, Workers
from vllm_suite.planner.sources.base import Outside, SourceError
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.traces import item_of

DATA = Path(os.environ.get("VLLM_SUITE_DATA", Path(__file__).resolve().parents[3].parent / "shared" / "data"))
TABLES = DATA / "llmservingsim" / "perf" / "RTXPRO6000"
SMALL = ["--model", "Qwen/Qwen3-0.6B", "--gpus", "2xRTX-4090", "--isl", "200", "--osl", "20", "--requests", "200",
         "--space", "pp=1", "tokens=2048", "seqs=256", "--processes", "1", "--ttft", "200ms", "--tpot",
         "20ms"]  # fmt: skip


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([*SMALL, *words])


# Time limit


@pytest.fixture(scope="module")
def searched():
    case = question(parsed())
    space, sample = space_of(case), case.sample()
    listed, _ = listing(case, space, sample, None, 1)
    return case, found_by("bounds", case, space, listed, sample, Effort(processes=1), State(None, "")), sample


def test_a_search_leaves_time_for_the_report():
    effort, deadline = timed(parsed("--time-limit", "100s"))
    assert effort.seconds == pytest.approx(100 * FOR_SEARCH)
    assert FOR_SEARCH < 1
    assert deadline is not None
    assert timed(parsed()) == (Effort(processes=1), None)


@pytest.mark.parametrize("made", [0, 1, 5, 6, 1000])
def test_a_report_that_ran_out_of_time_says_so_and_shows_what_it_has(searched, monkeypatch, made):
    case, result, sample = searched

    class Some(Workers):
        def map(self, tasks):
            for number, task in enumerate(tasks):
                if number == made:
                    raise OutOfTime
                yield self.run(task)

    monkeypatch.setattr(studying, "Workers", Some)
    found = studying.study(case, result, sample, 1, None)
    text = report(case, result, found)
    whole = made == 1000
    assert (found.cut == 0) == whole
    assert ("The report is not whole" in text) != whole
    if not whole:
        assert f"{found.cut} of its simulations" in text
    # What was not simulated is not shown as what cannot be served.
    assert "cannot be served" not in text
    assert f"holds the targets up to {found.best.found.goodput:.4g}" in text
    rows = sum(line.strip().startswith(("rate x", "prompts x", "outputs x")) for line in text.splitlines())
    assert rows == len(found.rates) + len(found.lengths)
    assert (rows == 7) == whole
    assert ("nothing was asked outside" in text) == whole
    json.dumps(studying.as_json(found, case))


def test_a_deadline_that_has_passed_ends_the_report(searched):
    case, result, sample = searched
    found = studying.study(case, result, sample, 1, 0.0)
    assert found.best.outcome is None
    assert found.cut > 10


def test_without_a_price_the_report_says_how_to_give_one(searched):
    case, result, sample = searched
    # The best plan's own figures alone, so that nothing else takes time.
    found = studying.study(case, result, sample, 1, 0.0)
    outcome = case.outcome(What(result.best.plan, found.rate), sample)
    found.front = [replace(found.best, outcome=outcome)]
    text = report(case, result, found)
    assert "RTX-4090 has no price here" in text
    assert "money/M" not in text
    found.front = [replace(found.best, outcome=replace(outcome, money_per_million=1.25))]
    text = report(case, result, found)
    assert "money/M tokens" in text
    assert "  1.25\n" in text
    assert "has no price" not in text


def test_an_error_bar_holds_what_is_in_its_middle(searched):
    case, result, sample = searched
    found = studying.study(case, result, sample, 1, 0.0)
    outcome = case.outcome(What(result.best.plan, found.rate), sample)
    found.best = replace(found.best, outcome=outcome)
    low, middle, high = (replace(outcome.ttft, at_share=seconds) for seconds in (0.1, 0.2, 0.4))
    found.best = replace(found.best, outcome=replace(outcome, ttft=high))
    found.quick, found.slow = replace(outcome, ttft=low), replace(outcome, ttft=middle)
    assert "TTFT 100 ms to 400 ms" in report(case, result, found)


# Sources


@pytest.mark.skipif(not TABLES.is_dir(), reason="layer times are not there: set VLLM_SUITE_DATA")
def test_tables_are_found_by_the_folder_of_a_device():
    model, quant = load("meta-llama/Llama-3.1-8B")
    inside = TABLES / "meta-llama/Llama-3.1-8B" / "bf16"
    assert profile(TABLES, model, quant) == profile(inside, model, quant) == inside
    with pytest.raises(SourceError, match=r"no meta.yaml in .*RTXPRO6000, and none in .*/fp8"):
        profile(TABLES, model, replace(quant, weights="fp8"))


@pytest.mark.skipif(not TABLES.is_dir(), reason="layer times are not there: set VLLM_SUITE_DATA")
def test_a_host_time_lengthens_every_step_of_tables():
    hardware = cluster("2xRTX-PRO-6000")
    model, quant = load("meta-llama/Llama-3.1-8B")
    step = Steps.of(contexts=[500] * 8)
    bare, host = (
        source_maker(f"tables={TABLES}", hardware, host_us=us)(model, quant, Parallel()).step_seconds(step)
        for us in (0.0, 1000.0)
    )
    assert host - bare == pytest.approx(1e-3)


def test_a_host_time_of_a_source_that_has_one_is_refused():
    with pytest.raises(SourceError, match="roofline has its own"):
        question(parsed("--host-time", "2ms"))


def test_a_source_that_knows_no_cut_says_what_it_lacks(tmp_path, capsys):
    assert main(["plan", *SMALL, "--source", f"tables={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "lacks" in said
    assert f"no meta.yaml in {tmp_path}" in said


def test_items_take_the_time_that_their_source_says():
    model, quant = load("OpenGVLab/InternVL2-26B")
    hardware = cluster("1xH100-SXM")

    class Tower:
        def __init__(self):
            self.outside, self.asked = Outside(), 0

        def encode_seconds(self, items):
            self.asked += 1
            self.outside.clamp("patches", 9.0, 0.0, 5.0)
            return 0.25 * len(list(items))

    tower = Tower()
    own = Sources(source_maker("roofline", hardware), model, quant, hardware, encoders=lambda *of: tower)
    item = item_of(model.encoder, "1024x768")
    assert own.encode(PoolPlan("encode", 1), item) == 0.25
    assert own.encode(PoolPlan("encode", 3), item) == 0.25
    assert tower.asked == 1
    assert own.scaled(2.0).encode(PoolPlan("encode", 1), item) == 0.5
    assert own.outside()["patches"]["furthest"] == 9.0
    roofline = Sources(source_maker("roofline", hardware), model, quant, hardware)
    tower = encoder_maker("roofline", hardware)(model, quant, Parallel())
    alone = tower.encode_seconds([item_cost(model.encoder, item.kind)])
    assert roofline.encode(PoolPlan("encode", 1), item) == alone


def test_aic_has_its_own_encoders():
    pytest.importorskip("aiconfigurator_core", reason="the extra `aic` is not installed")
    model, quant = load("Qwen/Qwen2.5-VL-7B-Instruct")
    hardware = cluster("1xH100-SXM")
    item = item_of(model.encoder, "1280x960")
    times = []
    for source, host in (("roofline", 0.0), ("aic", 0.0), ("aic", 4331.0)):
        own = Sources(source_maker(source, hardware, host_us=host), model, quant, hardware,
                      encoders=encoder_maker(source, hardware, host_us=host))  # fmt: skip
        times.append(own.encode(PoolPlan("encode", 1), item))
    assert times[0] != times[1]
    assert times[2] - times[1] == pytest.approx(4331e-6)


def test_a_calibrated_engine_is_planned_with_as_it_was_measured(monkeypatch):
    facts = {"block_size": 128, "blocks": 64, "max_model_len": 2048, "max_num_seqs": 16, "max_num_batched_tokens": 512,
             "async_scheduling": False}  # fmt: skip
    monkeypatch.setattr(asking, "measured", lambda source, *names: facts)
    words = [word for word in SMALL if not word.startswith(("seqs", "tokens"))]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    case = question(parser.parse_args(words))
    assert (case.setting.block_size, case.setting.async_scheduling, case.longest) == (128, False, 2048)
    engines = space_of(case).engines("any")
    assert {(pool.max_num_seqs, pool.max_num_batched_tokens, pool.kv_blocks) for pool in engines} == {(16, 512, 64)}
    limits = case.setting.limits(engines[0])
    assert (limits.blocks, limits.block_size) == (64, 128)
    spec = fleet_of(Plan((engines[0],)), case.setting, case.slo, model="m", longest=case.longest)
    assert spec.pools.any.engine.args == ("--num-gpu-blocks-override", "64")
    # What is named in the space is taken as it is.
    assert {pool.max_num_seqs for pool in space_of(question(parsed())).engines("any")} == {256}


# Pictures


def test_pictures_bring_plans_with_encoders_and_a_fleet_with_an_encode_pool(tmp_path, capsys):
    path = tmp_path / "fleet.yaml"
    words = ["--model", "Qwen/Qwen2.5-VL-7B-Instruct", "--gpus", "4xH100-SXM", "--isl", "300", "--osl", "20",
             "--images", "2", "--image-size", "1280x960", "--ttft", "500ms", "--tpot", "30ms", "--requests", "150",
             "--processes", "1"]  # fmt: skip
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    case = question(parser.parse_args([*words, "--space", "tp=1", "pp=1", "seqs=128", "tokens=2048"]))
    kinds = {each.kind for each in listing(case, space_of(case), case.sample(), None, 1)[0]}
    assert kinds == {"any", "prefill+decode", "encode+any", "encode+prefill+decode"}
    status = main(["plan", *words, "--space", "tp=1", "pp=1", "seqs=128", "tokens=2048", "kinds=epd", "-o", str(path)])
    assert status == 0
    spec = load_fleet(path)
    assert spec.plugins == ("disagg", "epd")
    assert spec.pools.encode.replicas + spec.pools.prefill.replicas + spec.pools.decode.replicas == 4
    assert "encode" in capsys.readouterr().out


# APEX's schemes


def test_nine_of_apexs_schemes_are_plans_here():
    words = ["--model", "meta-llama/Llama-3.1-70B", "--gpus", "8xH100-SXM", "--isl", "100", "--osl", "20", "--ttft",
             "1s", "--requests", "200", "--space", "schemes=apex", "seqs=256", "tokens=2048,8192"]  # fmt: skip
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(words)
    case = question(args)
    listed, said = listing(case, space_of(case), case.sample(), None, 1)
    assert said.startswith("26 schemes of APEX, 9 of which vLLM can start")
    cuts = {(pool.count, pool.parallel.tp, pool.parallel.pp) for each in listed for pool in each.plan.pools}
    assert len(listed) == 2 * len(cuts)
    assert {count * tp * pp for count, tp, pp in cuts} == {8}
    assert {(1, 8, 1), (2, 4, 1), (1, 1, 8), (1, 2, 4)} <= cuts
    assert sorted({each.level for each in listed}) == [0, 1]
    with pytest.raises(PlanError, match="schemes=apex has none"):
        listing(case, space_of(case), case.sample(), "high", 1)


def test_a_model_that_apex_cannot_describe_is_refused():
    args = parsed("--model", "deepseek-ai/DeepSeek-V3", "--gpus", "16xH200")
    args.space = ["schemes=apex"]
    case = question(args)
    with pytest.raises(PlanError, match=r"schemes=apex: .*APEX describes models of one kind of block"):
        listing(case, space_of(case), case.sample(), None, 1)


def test_other_schemes_are_refused():
    with pytest.raises(PlanError, match="schemes is apex, not tp"):
        question(parsed("--space", "schemes=tp"))
