"""A calibration's serving constants in plans: the recorded one of two cores, and made ones."""

from __future__ import annotations

import argparse
import importlib
import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.cli.main import main
from vllm_suite.cli.plan import add_arguments
from vllm_suite.planner.calibrate.file import Calibration
from vllm_suite.planner.calibrate.served import Constants
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.report.command import space_of
from vllm_suite.planner.report.question import question
from vllm_suite.planner.search.case import Case, What
from vllm_suite.planner.search.sources import measured
from vllm_suite.planner.simulator.company import Company
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving
from vllm_suite.planner.sources.base import Load, SourceError
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.sources.transfers import SETUP_S
from vllm_suite.planner.workload import Request
from vllm_suite.roles.predict import PredictError, Predictor

ROOT = Path(__file__).resolve().parents[3]
RESULT = json.loads((ROOT / "benchmarks/results/planner_cpu.cpu-2core.json").read_text())
RECORDED = Calibration.model_validate(RESULT["calibration"])
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "num_hidden_layers": 8,
          "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "intermediate_size": 2816,
          "vocab_size": 512, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}  # fmt: skip
ONE = Plan((PoolPlan("any", 1, kv_blocks=1023, max_num_seqs=16, max_num_batched_tokens=512),)).placed()
TWO = Plan((replace(ONE.pools[0], count=2, ranks=()),)).placed()
SPLIT = Plan(tuple(replace(ONE.pools[0], role=role, ranks=()) for role in ("prefill", "decode"))).placed()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


def changed(**constants: dict[str, Any] | None) -> Calibration:
    """The recorded calibration with other constants of a kind of fleet, or without that kind."""
    serving = {kind: RECORDED.serving[kind].model_copy(update=value) for kind, value in constants.items() if value}
    kept = {kind: value for kind, value in RECORDED.serving.items() if kind not in constants}
    return RECORDED.model_copy(update={"serving": {**kept, **serving}})


def asked(folder: Path, calibration: Calibration, *words: str) -> list[str]:
    calibration.save(folder.parent / "engine.json")
    return ["--model", str(folder), "--gpus", "2xCPU-2CORE", "--isl", "100", "--osl", "20", "--ttft", "2s", "--tpot",
            "100ms", "--requests", "100", "--space", "kinds=colocated", "--processes", "1", "--source",
            f"calibrated={folder.parent / 'engine.json'}", *words]  # fmt: skip


def case(folder: Path, calibration: Calibration, *words: str) -> Case:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return question(parser.parse_args(asked(folder, calibration, *words)))


def load(index: int) -> list[Request]:
    rate = RESULT["rows"][index]["rate"]
    return [Request(n, arrival / rate, prompt, output) for n, prompt, output, arrival in RESULT["requests"][index]]


# -- the benchmark's predictions


@pytest.mark.parametrize("index", [0, 1, 2])
def test_predictions_are_those_that_were_recorded(index: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of the recorded arrivals, which may move one request of a run by a step."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    predict = importlib.import_module("planner_cpu_predict")
    for kind, found in (
        ("colocated", predict.colocated(RECORDED, load(index), 256, model)),
        ("disaggregated", predict.disaggregated(RECORDED, load(index), model)),
    ):
        each = RESULT["each"][kind][index]
        for name in ("ttft", "tpot"):
            off = abs(getattr(found, name) - each[f"predicted_{name}"])
            assert sum(off > 2e-4) <= 1


# Sums of TTFT and TPOT over 100 requests, in whose change something that counts for all of them shows.
SUMS = {
    ("colocated", 0): (22.082958604783123, 2.798116265755435),
    ("disaggregated", 0): (36.50127078205156, 2.5493862456253567),
    ("colocated", 1): (26.520161261926436, 3.0114504962528392),
    ("disaggregated", 1): (40.83322104654367, 2.582749129081035),
    ("colocated", 2): (25.26788097622594, 3.135420046318175),
    ("disaggregated", 2): (42.565765284189155, 2.5942970892220156),
}


@pytest.mark.parametrize(("kind", "index"), list(SUMS))
def test_all_constants_count_as_they_did(kind: str, index: int, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    predict = importlib.import_module("planner_cpu_predict")
    made = {
        name: {
            "busy_s": 0.0071 + 0.001 * place, "request_s": found.request_s + 0.0033, "answer_cpu_s": 0.002 * place,
            "prompt_token_s": found.prompt_token_s + 1.3e-5, "prompt_cpu_s": 0.0028,
        }
        for place, (name, found) in enumerate(RECORDED.serving.items())
    }  # fmt: skip
    calibration = changed(**made)
    if kind == "colocated":
        found = predict.colocated(calibration, load(index), 256, model)
    else:
        found = predict.disaggregated(calibration, load(index), model)
    assert (sum(found.ttft.tolist()), sum(found.tpot.tolist())) == pytest.approx(SUMS[kind, index], rel=1e-12)


# -- company


def test_company_is_whoever_is_there_at_the_arrival_or_at_the_first_token() -> None:
    """Against the definition, on intervals drawn at random; and one by hand."""
    draw = random.Random(3)
    for _ in range(30):
        rows, at = [], 0.0
        for _ in range(40):
            at += draw.expovariate(0.5)
            first = at + draw.expovariate(1)
            rows.append((at, first, first + draw.expovariate(0.7)))
        assert company(rows) == [
            any(other[0] <= moment < other[2] for other in rows if other is not row for moment in row[:2])
            for row in rows
        ]
    rows = [(0.0, 0.2, 1.0), (1.5, 2.5, 4.0), (2.0, 2.1, 3.0), (5.0, 5.3, 6.0)]
    assert company(rows) == [False, True, True, False]


def company(rows: list[tuple[float, float, float]]) -> list[bool]:
    """Told in the order of the clock."""
    told, found = Company(), [False] * len(rows)
    events = [(row[0], 0, number) for number, row in enumerate(rows)]
    events += [(row[2], 1, number) for number, row in enumerate(rows)]
    for _, end, number in sorted(events):
        if end:
            found[number] = told.left(number, *rows[number][1:])
        else:
            told.came(number, rows[number][0])
    return found


# -- plans


def served(calibration: Calibration, plan: Plan, folder: Path, requests: list[Request]) -> list[Served]:
    setting = case(folder, calibration).setting
    setting = replace(setting, serving=Serving(min_prompt_tokens=0)).settled(plan, lambda: requests)
    found: list[Served] = []
    simulate_plan(plan, setting, requests, found.append)
    return sorted(found, key=lambda each: each.number)


def test_a_first_token_comes_later_by_the_constants_and_no_other_token_does(model: Path) -> None:
    alone = {"step_s": 0.0, "sequence_s": 0.0, "request_s": 0.0, "prompt_token_s": 0.0, "busy_s": 0.0}
    added = {**alone, "request_s": 0.5, "prompt_token_s": 1e-3, "busy_s": 0.25}
    requests = [Request(0, 0.0, 100, 20), Request(1, 0.1, 200, 20), Request(2, 100.0, 50, 20)]
    without, found = (
        served(changed(colocated=each, disaggregated=None), ONE, model, requests) for each in (alone, added)
    )
    later = [one.ttft - other.ttft for one, other in zip(found, without, strict=True)]
    assert later == pytest.approx([0.5 + 0.1 + 0.25, 0.5 + 0.2 + 0.25, 0.5 + 0.05])
    assert [each.tpot for each in found] == [each.tpot for each in without]
    assert [each.latency - each.ttft for each in found] == pytest.approx([e.latency - e.ttft for e in without])


def test_a_plan_has_the_constants_in_its_figures(model: Path) -> None:
    """What is simulated for the search, and what the report says."""
    none = case(model, changed(colocated=None, disaggregated=None))
    some = case(model, changed(colocated={"request_s": 0.5, "prompt_token_s": 0.0, "busy_s": 0.0, "step_s": 0.01,
                                          "sequence_s": 0.0, "prompt_cpu_s": 0.0}))  # fmt: skip
    figures = []
    for each in (none, some):
        sample = each.sample()
        figures.append((each.outcome(What(ONE, 0.05), sample), each.evaluate(sample)(ONE, 0.05)))
    (outcome, trial), (later, slow) = figures
    assert later.tpot.mean - outcome.tpot.mean == pytest.approx(0.01, rel=0.2)
    # The step of the prompt has its 10 ms too.
    assert later.ttft.mean - outcome.ttft.mean == pytest.approx(0.51, rel=0.05)
    assert later.stages["beside_steps"] == pytest.approx(0.5)
    assert "beside_steps" not in outcome.stages
    assert slow.ttft - trial.ttft == pytest.approx(0.51, rel=0.05)
    assert slow.tpot - trial.tpot == pytest.approx(0.01, rel=0.2)
    assert none.key(space_of(none)) != some.key(space_of(some))


def test_engines_slow_each_other_by_how_busy_they_are(model: Path) -> None:
    # The recorded engines hardly do.
    names = ("constant", "chunk", "before", "pair", "sequence", "key")
    fit = RECORDED.alone.step
    slow = fit.model_copy(update={name: 1.5 * getattr(fit, name) for name in names})
    slow = slow.model_copy(update={"slopes": tuple(1.5 * each for each in fit.slopes)})
    beside = RECORDED.alone.model_copy(update={"step": slow})
    setting = case(model, RECORDED.model_copy(update={"beside": beside, "serving": {}})).setting
    step = Steps.of(contexts=[300] * 2)
    alone = setting.source(ONE.pools[0]).step_seconds(step)
    both = setting.source(ONE.pools[0]).loaded(Load(neighbours=1.0)).step_seconds(step)
    assert both == pytest.approx(1.5 * alone)
    busy = [Request(number, 0.2 * number, 200, 60) for number in range(60)]
    times = [
        setting.settled(plan, partial(list, requests)).source(plan.pools[0]).step_seconds(step)
        for plan, requests in ((ONE, busy), (TWO, [Request(n, 30.0 * n, 20, 2) for n in range(9)]), (TWO, busy))
    ]
    assert times[0] == alone
    assert times[1] == pytest.approx(alone, rel=0.02)
    assert alone + 0.8 * (both - alone) < times[2] <= both
    assert setting.settled(TWO, lambda: busy).measured is None


def test_a_hand_over_takes_what_was_measured(model: Path) -> None:
    plain, handed = ({"request_s": r, "prompt_token_s": p, "busy_s": 0.0, "step_s": 0.0, "sequence_s": 0.0,
                      "prompt_cpu_s": 0.0, "answer_cpu_s": 0.0, "shared_token_s": 0.0, "pull_s": 0.03}
                     for r, p in ((0.1, 1e-3), (0.3, 3e-3)))  # fmt: skip
    # Equal constants are a hand-over that takes what any takes at least.
    requests = [Request(0, 0.0, 128, 4), Request(1, 50.0, 1024, 4)]
    without, found = (
        served(changed(colocated=plain, disaggregated=each), SPLIT, model, requests) for each in (plain, handed)
    )
    later = [one.ttft - other.ttft for one, other in zip(found, without, strict=True)]
    assert later == pytest.approx([0.2 + 0.256 - SETUP_S, 0.2 + 2.048 - SETUP_S], rel=1e-4)
    assert found[0].transferred - found[0].transfer_start == pytest.approx(0.03 + 0.256, rel=1e-3)
    # Nobody measured it: the links are those of the hardware.
    setting = case(model, changed(disaggregated=None)).setting
    settled = setting.settled(SPLIT, lambda: requests)
    assert settled.cluster == setting.cluster
    assert settled.serving.request_s == RECORDED.serving["colocated"].request_s


def test_router_and_client_slow_the_engine_that_prefills(model: Path) -> None:
    setting, step = case(model, changed(disaggregated={"shared_token_s": 0.01})).setting, Steps.of(chunks=[(100, 0)])
    times = []
    for gap in (1.0, 2.0):
        requests = [Request(number, gap * number, 20, 20) for number in range(11)]
        times.append(setting.settled(SPLIT, partial(list, requests)).source(SPLIT.pools[0]).step_seconds(step))
    # 220 tokens in 10 s and in 20 s: 22 and 11 % of the core. How busy decode is moves it a little too.
    assert times[0] / times[1] == pytest.approx((1 - 0.11) / (1 - 0.22), rel=0.03)


def test_the_router_charges_what_it_was_told(model: Path) -> None:
    """By true lengths the third request goes beside the short answer, by equal ones beside the short prompt."""
    requests = [Request(0, 0.0, 20, 200), Request(1, 0.01, 60, 2), Request(2, 0.02, 20, 200)]
    setting = case(model, changed(colocated=None, disaggregated=None)).setting
    ends = []
    for told in (None, 256):
        found: list[Served] = []
        simulate_plan(TWO, replace(setting, serving=Serving(answer_tokens=told), measured=None), requests, found.append)
        ends.append({each.number: each.latency for each in found})
    assert ends[1][0] > ends[0][0]


# -- the file and the report


def test_a_calibration_of_another_model_is_refused(model: Path) -> None:
    other = RECORDED.model_copy(update={"model": "Qwen3-0.6B", "path": "Qwen/Qwen3-0.6B"})
    with pytest.raises(SourceError, match=rf"measured with Qwen/Qwen3-0.6B, not with {model}; calibrate"):
        case(model, other)
    assert main(["plan", *asked(model, other)]) == 2
    path = model.parent / "engine.json"
    for name in ("Qwen/Qwen3-0.6B", "/elsewhere/qwen3-0.6b", "/elsewhere/Qwen3-0.6B/config.json"):
        assert measured(f"calibrated={path}", name)["blocks"] == 1024
    assert measured(f"calibrated={path}", "/checkpoints/1", "Qwen/Qwen3-0.6B")
    assert measured("roofline", "anything") == {}


def test_roles_refuse_it_too(model: Path) -> None:
    from vllm_suite.fleet.spec import FleetSpec

    path = model.parent / "engine.json"
    RECORDED.model_copy(update={"model": "other", "path": "/x/other"}).save(path)
    predict = {"hardware": "3xCPU-2CORE", "source": f"calibrated={path}"}
    fleet = {"model": str(model), "pools": {"any": {"replicas": 3}}, "roles": {"rule": "goodput", "predict": predict}}
    with pytest.raises(PredictError, match="measured with /x/other, not with"):
        Predictor(FleetSpec.model_validate(fleet))


def test_the_report_says_whose_constants_they_are(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *asked(model, RECORDED, "--rate", "0.2", "--objective", "latency")]) == 0
    said = capsys.readouterr().out
    assert (
        "note:     serving constants (colocated and disaggregated) are of the machine of the calibration, AMD" in said
    )
    assert "note:     engines slow each other as 2 of them did there" in said


def test_what_was_not_measured_is_said() -> None:
    assert "no serving constants" in Constants(changed(colocated=None, disaggregated=None)).notes[0]
    assert "no hand-over was measured" in Constants(changed(disaggregated=None)).notes[1]
    assert "without those of a colocated fleet" in Constants(changed(colocated=None)).notes[1]
    alone = RECORDED.model_copy(update={"beside": None})
    assert len(Constants(alone).notes) == 1
