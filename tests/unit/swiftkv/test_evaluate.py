"""`vllm-suite swiftkv eval` without an engine: arguments, the plan of runs, rows and averages, failures half way."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_suite.cli.main import main
from vllm_swiftkv import evaluate, evaluate_cli
from vllm_swiftkv.evaluate_report import Evaluation, average, rows, table
from vllm_swiftkv.evaluate_tasks import PAPER, RENAMED, Request, _kind, _leaves
from vllm_swiftkv.evaluate_worker import RunSpec, _plain, engine_arguments, environment
from vllm_swiftkv.families import SwiftKVError

# --- arguments ---


def installed(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """For that module alone: packages that are imported meanwhile ask too, and remember the answer."""
    util = SimpleNamespace(find_spec=lambda name: name if there else None)
    monkeypatch.setattr(evaluate_cli, "importlib", SimpleNamespace(util=util))


def said(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a refusal, on a machine that has the harness."""
    installed(monkeypatch, True)
    assert main(["swiftkv", "eval", "--model", "anywhere", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--preset", "paper", "--num-fewshot", "3"], "--num-fewshot goes with --tasks"),
        (["--preset", "paper", "--apply-chat-template"], "--apply-chat-template goes with --tasks"),
        (["--tasks", "a", "--fewshot-as-multiturn"], "--fewshot-as-multiturn needs --apply-chat-template"),
        (["--tasks", "a", "--engine-args", "{"], "--engine-args is no JSON"),
        (["--tasks", "a", "--engine-args", "[1]"], "--engine-args must be a JSON object"),
        (["--tasks", "a", "--engine-args", '{"kv_sharing_fast_prefill": true}'], "'kv_sharing_fast_prefill' is set by"),
        (["--tasks", "a", "--include-path", "/does/not/exist"], "--include-path /does/not/exist: no such folder"),
    ],
)
def test_refusals(
    words: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in said(words, monkeypatch, capsys)


def test_a_folder_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(["--model", str(tmp_path), "--tasks", "a"], monkeypatch, capsys)
    assert f"{tmp_path}: no checkpoint there (config.json is missing)" in text


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    installed(monkeypatch, False)
    assert main(["swiftkv", "eval", "--model", "m", "--preset", "paper"]) == 2
    text = "error: lm-evaluation-harness is not installed: pip install 'vllm-suite[eval]'\n"
    assert capsys.readouterr().err == f"vllm-suite swiftkv eval: {text}"


def test_the_preset_is_the_papers_protocol() -> None:
    settings = {r.name: (r.num_fewshot, r.chat, r.multiturn, r.max_gen_toks) for r in PAPER if r.averaged}
    assert settings == {
        "truthfulqa_mc2": (0, False, False, None),
        "winogrande": (5, False, False, None),
        "hellaswag": (10, False, False, None),
        "arc_challenge_llama": (0, True, False, 1024),
        "gsm8k_llama": (8, True, True, 1024),
        "mmlu_llama": (5, True, True, 1024),
        "mmlu_cot_llama": (0, True, False, 1024),
    }
    assert [r.name for r in PAPER if not r.averaged] == ["ifeval"]
    assert len(RENAMED) == 4
    assert RENAMED["mmlu_cot_0shot_llama_3.1_instruct"] == "mmlu_cot_llama"


# --- which tasks skip, and which runs that makes ---


def task(name: str, **config: Any) -> SimpleNamespace:
    return SimpleNamespace(cfg={"task": name, **config}, tags=set())


INDEX: dict[str, Any] = {
    "writes": task("writes", output_type="generate_until"),
    "chooses": task("chooses", output_type="multiple_choice"),
    "own": task("own", output_type="generate_until", **{"class": "Own"}),
    "tag": SimpleNamespace(cfg=None, tags={"writes", "chooses"}),
    "both": SimpleNamespace(cfg={"group": "both", "task": ["writes", {"group": "in", "task": "chooses"}]}, tags=set()),
    "texts": SimpleNamespace(cfg={"group": "texts", "task": [{"task": "writes", "num_fewshot": 3}]}, tags=set()),
    "changed": SimpleNamespace(
        cfg={"group": "changed", "task": [{"task": "writes", "output_type": "multiple_choice"}]}, tags=set()
    ),
    "missing": SimpleNamespace(cfg={"group": "missing", "task": ["writes", "elsewhere"]}, tags=set()),
    "circle": SimpleNamespace(cfg={"group": "circle", "task": ["writes", "circle"]}, tags=set()),
}


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("writes", ["generate_until"]),
        ("chooses", ["multiple_choice"]),
        ("own", [None]),
        ("tag", ["multiple_choice", "generate_until"]),
        ("both", ["generate_until", "multiple_choice"]),
        ("texts", ["generate_until"]),
        ("changed", ["multiple_choice"]),
        ("missing", ["generate_until", "unknown"]),
        ("circle", ["generate_until", "unknown"]),
    ],
)
def test_kinds_below_a_name(name: str, kinds: list[str | None]) -> None:
    assert ["unknown" if leaf is None else _kind(leaf) for leaf in _leaves(INDEX, name)] == kinds


def test_a_swiftkv_model_takes_a_run_without_the_skip_and_one_with_it() -> None:
    requests = tuple(Request(name=name) for name in "abc")
    common = RunSpec(model="", skip=None, requests=requests, seed=7, engine={"max_model_len": 64})
    kinds = {"a": True, "b": False, "c": True}
    runs = list(evaluate.plan("M", True, kinds, common))
    assert [(r.model, r.skip, [q.name for q in r.requests]) for r in runs] == [
        ("M", False, ["b"]),
        ("M", True, ["a", "c"]),
    ]
    assert all((r.seed, r.engine) == (7, {"max_model_len": 64}) for r in runs)
    assert [r.skip for r in evaluate.plan("M", True, dict.fromkeys("abc", True), common)] == [True]
    assert [(r.skip, r.requests) for r in evaluate.plan("B", False, kinds, common)] == [(None, requests)]


@pytest.mark.parametrize("skip", [True, False])
def test_the_skip_is_set_through_the_plugins_own_settings(skip: bool) -> None:
    mine = {"additional_config": {"suite": {"swiftkv": {"late_kv_kernel": "off"}, "x": 1}, "y": 2}, "max_model_len": 9}
    made = engine_arguments(RunSpec(model="M", skip=skip, requests=(), engine=mine))
    assert made["additional_config"] == {
        "suite": {"swiftkv": {"late_kv_kernel": "off", "skip": skip}, "x": 1},
        "y": 2,
    }
    assert (made["pretrained"], made["max_model_len"]) == ("M", 9)
    assert environment(skip)["VLLM_SUITE_PLUGINS"] == "swiftkv"
    assert mine["additional_config"]["suite"]["swiftkv"] == {"late_kv_kernel": "off"}


def test_an_ordinary_model_runs_without_the_plugin() -> None:
    made = engine_arguments(RunSpec(model="M", skip=None, requests=()))
    assert not {"additional_config", "worker_extension_cls"} & set(made)
    assert environment(None)["VLLM_SUITE_PLUGINS"] is None


# --- rows, averages ---


def harness(**tasks: dict[str, Any]) -> dict[str, Any]:
    """Results of one request as the harness gives them."""
    return {
        "results": tasks,
        "versions": dict.fromkeys(tasks, 2.0),
        "n-shot": dict.fromkeys(tasks, 5),
        "higher_is_better": {name: {"acc": True, "acc_norm": True, "ppl": False} for name in tasks},
        "n-samples": {name: {"original": 90, "effective": 12} for name in tasks},
    }


def test_rows_of_a_task() -> None:
    found = {"name": "t", "alias": "t", "sample_len": 12, "acc,none": 0.25, "acc_stderr,none": 0.1}
    found |= {"acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A"}
    first, second = rows(Request(name="t", headline="acc_norm,none"), harness(t=found), False)
    assert (first.metric, first.value, first.stderr, first.headline) == ("acc", 0.25, 0.1, False)
    assert (second.metric, second.value, second.stderr, second.headline) == ("acc_norm", 0.5, None, True)
    assert (first.skip, first.version, first.shots, first.samples) == (False, 2.0, 5, 12)
    assert [row.headline for row in rows(Request(name="t"), harness(t=found), True)] == [True, False]


def test_rows_of_a_group_are_the_groups_and_those_of_a_tag_its_tasks() -> None:
    results = harness(a={"acc,none": 0.1}, b={"acc,none": 0.3}, g={"acc,none": 0.2})
    group = rows(Request(name="g", headline="acc,none"), results, None)
    assert [(row.task, row.metric, row.value) for row in group] == [("g", "acc", 0.2)]
    tag = rows(Request(name="tag"), harness(a={"acc,none": 0.1}, b={"acc,best": 0.3}), None)
    assert [(row.metric, row.value, row.headline) for row in tag] == [
        ("a: acc", 0.1, True),
        ("b: acc, best", 0.3, True),
    ]


def test_numbers_survive_the_way_from_the_run() -> None:
    given = {"a": np.float32(0.5), "b": np.int64(3), "c": Path("x"), "d": np.float64(0.25)}
    assert json.loads(json.dumps(given, default=_plain)) == {"a": 0.5, "b": 3, "c": "x", "d": 0.25}


def result(skip: bool | None, **values: float) -> dict[str, Any]:
    made = {name: harness(**{name: {"acc,none": value, "ppl,none": 9.0}}) for name, value in values.items()}
    return {"skip": skip, "requests": {name: {"results": found} for name, found in made.items()}}


def test_the_average_is_the_plain_mean_of_the_headlines() -> None:
    requests = [
        Request(name="a"),
        Request(name="b"),
        Request(name="c", averaged=False),
        Request(name="d", headline="ppl,none"),
    ]
    evaluation = Evaluation(requests)
    evaluation.add(result(True, b=0.6, c=0.9))
    evaluation.add(result(False, a=0.2, d=0.7))
    joined = evaluation.joined()
    assert [row.task for row in joined] == ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert [row.skip for row in joined] == [False, False, True, True, True, True, False, False]
    mean = average(joined)
    assert mean == {"tasks": 2, "value": pytest.approx(0.4), "base": None, "difference": None}
    evaluation.add(result(None, a=0.3), base=True)
    half = average(evaluation.joined())
    assert half is not None
    assert half["base"] is None, "a mean over fewer tasks is not comparable"
    evaluation.add(result(None, b=0.9, c=0.1), base=True)
    whole = average(evaluation.joined())
    assert whole is not None
    assert whole["base"] == pytest.approx(0.6)
    assert whole["difference"] == pytest.approx(-0.2)
    assert {(r.task, r.metric): r.difference for r in evaluation.joined()}[("a", "acc")] == pytest.approx(-0.1)


def test_the_table() -> None:
    from rich.console import Console

    evaluation = Evaluation([Request(name="a"), Request(name="b")])
    evaluation.add(result(False, a=0.25))
    evaluation.add(result(True, b=0.75))
    evaluation.add(result(None, a=0.5, b=0.75), base=True)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(evaluation.joined(), "title", base=True))
    lines = [line.replace("│", " ").split() for line in console.export_text().splitlines()]
    assert ["a", "acc", "0.2500", "-", "off", "0.5000", "-0.2500"] in lines
    assert ["b", "acc", "0.7500", "-", "on", "0.7500", "+0.0000"] in lines
    assert ["average", "of", "2", "0.5000", "0.6250", "-0.1250"] in lines


# --- failures ---


def test_a_run_that_fails_loses_nothing_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(spec: RunSpec, timeout_s: float) -> dict[str, Any]:
        if spec.skip:
            raise evaluate.RunFailed("no memory left")
        return {**result(False, a=0.25), "start_s": 1.0, "run_s": 2.0} | {
            "requests": {
                "a": {"counters": {}, "results": harness(a={"acc,none": 0.25}) | {"samples": {"a": [{"x": 1}]}}}
            }
        }

    installed(monkeypatch, True)
    monkeypatch.setattr(evaluate, "is_swiftkv", lambda model: True)
    monkeypatch.setattr(evaluate, "prepare", lambda requests, include: {"a": False, "b": True})
    monkeypatch.setattr(evaluate, "_run", run)
    report = tmp_path / "deep" / "report.json"
    words = ["--model", "M", "--tasks", "a,b", "--json", str(report), "--samples", str(tmp_path / "samples")]
    assert main(["swiftkv", "eval", *words]) == 1
    captured = capsys.readouterr()
    assert "0.2500" in captured.out
    assert captured.err.endswith("error: no memory left\n")
    written = json.loads(report.read_text())
    assert written["complete"] is False
    assert [(row["task"], row["value"]) for row in written["rows"]] == [("a", 0.25)]
    assert "samples" not in written["runs"][0]["requests"]["a"]["harness"]
    assert json.loads((tmp_path / "samples" / "model_a.jsonl").read_text()) == {"x": 1}


@pytest.mark.parametrize("killed", [False, True])
def test_no_process_of_a_run_is_left_behind(tmp_path: Path, killed: bool) -> None:
    """A run that does not end in time, and one that dies and leaves a child, as an engine core would be left."""
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
    last = "os.kill(os.getpid(), 9)" if killed else "time.sleep(600)"
    code = (
        "import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]]);"
        f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists(sys.argv[2]), True)]; time.sleep(0.1); {last}"
    )
    file = tmp_path / "pid"
    command = [sys.executable, "-c", code, child, str(file)]
    begun = time.monotonic()
    if killed:
        assert evaluate._wait(command, sys.stderr.fileno(), 60.0) == -9
    else:
        with pytest.raises(evaluate.RunFailed, match="took longer than 3 s"):
            evaluate._wait(command, sys.stderr.fileno(), 3.0)
    assert time.monotonic() - begun < 30
    status = Path(f"/proc/{file.read_text()}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "its child is still there"
        time.sleep(0.01)


@pytest.mark.parametrize(("status", "error"), [(2, SwiftKVError), (1, evaluate.RunFailed), (-9, evaluate.RunFailed)])
def test_how_a_run_ends(status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(command: list[str], log: Any, timeout_s: float) -> int:
        if log is not None:
            log.write(b"what the engine said last\n")
        if status > 0:
            Path(command[-1]).write_text('{"error": "the reason"}')
        return status

    monkeypatch.setattr(evaluate, "_wait", wait)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    with pytest.raises(error, match="the reason" if status > 0 else "status -9") as caught:
        evaluate._run(RunSpec(model="M", skip=True, requests=()), 5.0)
    assert ("what the engine said last" in str(caught.value)) == (error is evaluate.RunFailed)
