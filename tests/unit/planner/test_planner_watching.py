"""`plan --watch` and `plan --html` on a small question: the search asked by a watch, and the page of a report."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_suite.cli import plan as command
from vllm_suite.fleet.files import load_fleet
from vllm_suite.planner.models import load
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.report.command import found_by, listing, space_of
from vllm_suite.planner.report.html import write_html
from vllm_suite.planner.report.predicted import of_plan, spec_of
from vllm_suite.planner.report.question import question
from vllm_suite.planner.report.study import study
from vllm_suite.planner.report.watching import Searched, watch_fleet
from vllm_suite.planner.search.case import Case, What
from vllm_suite.planner.search.search import Effort, SearchResult
from vllm_suite.planner.search.state import State
from vllm_suite.planner.traces import Workload, item_of
from vllm_suite.planner.watch import Histogram, Recorded, Window

WORDS = (
    "--model meta-llama/Llama-3.1-8B --gpus 2xH100-SXM --isl 300 --osl 30 --rate 8 --ttft 300ms --tpot 30ms"
    " --space tp=1,2 kinds=colocated,pd seqs=64 tokens=2048 --processes 1 --requests 120"
)


def asked(*more: str) -> tuple[argparse.Namespace, Case]:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = WORDS.split()
    if "--space" in more:  # in place of the other one
        del words[words.index("--space") : words.index("--processes")]
    args = parser.parse_args([*words, *more])
    return args, question(args)


def minute(start: float, rate: float, draw: np.random.Generator) -> Window:
    count = float(draw.poisson(60 * rate))
    prompts = Histogram((200.0, 500.0, float("inf")), (0.0, count, 0.0), 300 * count)
    return Window(start, 60.0, count, prompts, Histogram((50.0, float("inf")), (count, 0.0), 30 * count))


def test_a_watch_asks_the_search_for_the_traffic_of_now(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, case = asked()
    args.watch_file = tmp_path / "seen.json"
    draw, seen, written = np.random.default_rng(1), list[Case](), list[tuple[Plan, float | None]]()
    Recorded(args.watch_file).write([minute(60.0 * i, 8.0 if i < 45 else 60.0, draw) for i in range(80)])
    small = Plan((PoolPlan("any", 1, max_num_seqs=4, max_num_batched_tokens=512),))
    large = Plan((PoolPlan("any", 2),))

    def search(now: Case) -> SearchResult:
        seen.append(now)
        found: Any = SimpleNamespace(best=SimpleNamespace(plan=large))
        return found

    def write(plan: Plan, now: Case) -> None:
        written.append((plan, now.rate))

    assert watch_fleet(args, case, small, search, write) == 0
    (now,) = seen
    assert now.rate == pytest.approx(60, rel=0.1)
    assert now.asked
    assert now.workload.mean_prompt == pytest.approx(300)
    assert written == [(large, now.rate)]
    said = capsys.readouterr().out
    assert "shift of rate: 8" in said
    assert "change to 2 any" in said


def test_a_plans_goodput_is_of_the_traffic_of_now() -> None:
    _, case = asked()
    planner = Searched(case, lambda now: SearchResult(now.objective()))
    plan = Plan((PoolPlan("any", 1),))
    light, heavy = (Workload.synthetic(isl, 30, rate=8.0) for isl in (300, 3000))
    assert planner.goodput(plan, light) > 2 * planner.goodput(plan, heavy) > 0
    assert planner.goodput(Plan((PoolPlan("any", 1, kv_blocks=2),)), light) == 0
    assert planner.best(light) is None


def test_what_cannot_be_watched_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args, case = asked()
    args.watch_file = tmp_path / "absent.json"
    plan = Plan((PoolPlan("any", 1),))

    def none(now: Case) -> SearchResult:
        raise AssertionError

    assert watch_fleet(args, case, plan, none, lambda plan, case: None) == 2
    assert "absent.json" in capsys.readouterr().err
    encoder = load("Qwen/Qwen2.5-VL-7B-Instruct").model.encoder
    assert encoder is not None
    pictured = replace(case, workload=Workload.synthetic(300, 30, rate=8.0, items=(item_of(encoder, "640x480"),)))
    assert watch_fleet(args, pictured, plan, none, lambda plan, case: None) == 2
    assert "--images" in capsys.readouterr().err


def test_a_report_becomes_a_page(tmp_path: Path) -> None:
    args, case = asked("--space", "tp=1", "kinds=colocated,pd", "seqs=64", "tokens=2048", "idle=no")
    space, sample = space_of(case), case.sample()
    listed, _ = listing(case, space, sample, args.placement, 1)
    with State(None, case.key(space)) as state:
        result = found_by(args.method, case, space, listed, sample, Effort(processes=1), state)
    found = study(case, result, sample, 1)
    write_html(tmp_path / "report.html", case, result, found, sample, "the <report>", trace=tmp_path / "trace.json")
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 4
    assert "the &lt;report&gt;" in text
    assert found.best.found.plan.name in text
    assert "<script" not in text
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_command_watches_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw, fleet, seen = np.random.default_rng(2), tmp_path / "fleet.yaml", tmp_path / "seen.json"
    Recorded(seen).write([minute(60.0 * i, 8.0 if i < 45 else 400.0, draw) for i in range(80)])
    words = [
        *WORDS.replace("kinds=colocated,pd", "kinds=colocated").split(),
        "--attainment",
        "0.8",
        "--watch-file",
        str(seen),
        "-o",
        str(fleet),
    ]
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(words)) == 0
    said = capsys.readouterr().out
    assert "shift of rate: 8" in said
    # Two colocated engines are all that there is: the same plan, or one that is not better by enough.
    assert "  keep " in said or "  change to " in said
    predicted = load_fleet(fleet).predicted
    assert predicted is not None
    assert predicted.tpot is not None
    assert load_fleet(fleet).slo.attainment == 0.8
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--watch", "http://localhost"])


def test_a_plan_of_the_watch_is_predicted_at_the_traffic_of_now() -> None:
    _, case = asked()
    one, two = (Plan((PoolPlan("any", count),)) for count in (1, 2))
    light, heavy = (of_plan(plan, 40.0, case) for plan in (two, one))
    assert light is not None
    assert heavy is not None
    assert (light.rate, light.error, light.source) == (40.0, 0.25, "roofline")
    assert light.tpot is not None
    assert heavy.tpot is not None
    assert light.tpot.p50_low is not None
    assert light.tpot.p50_low < light.tpot.p50 < heavy.tpot.p50
    assert of_plan(Plan((PoolPlan("any", 1, kv_blocks=2),)), 40.0, case) is None
    assert of_plan(one, 5000.0, case) is None  # queues only grow


def test_queues_that_grow_have_no_upper_bound() -> None:
    _, case = asked()
    plan, sample = Plan((PoolPlan("any", 2),)), case.sample()
    own, slow = (case.outcome(What(plan, 40.0, scale=scale), sample) for scale in (1.0, 1.25))
    for trend, bounded in (("steady", True), ("growing", False)):
        found = spec_of(case, 40.0, 0.25, own, None, replace(slow, trend=trend))
        assert found is not None
        assert found.ttft is not None
        assert (found.ttft.p99_high is not None) == bounded
        assert found.ttft.p99_low is None
