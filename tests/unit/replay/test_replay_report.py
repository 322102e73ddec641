"""Metrics, comparisons, the halves of the seeds, and runs that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from replay_cases import CASES, Case, make_policy
from replay_engine import EngineSettings
from replay_harness import ROOM
from replay_report import against, draw, metrics, summary
from replay_runs import Run, execute, execute_all
from replay_workload import Arrivals
from scheduler_replay import halves, main


def result(latency: list[float], **more: Any) -> dict[str, Any]:
    plain = {
        "latency": latency,
        "first_token": latency,
        "outputs": [2] * len(latency),
        "preemptions": 3,
        "recomputed": 0,
        "overhead_s": 0.002,
        "steps": 10,
        "makespan": 9.0,
        "busy": 0.5,
        "rate": 1.0,
    }
    return {**plain, **more}


def test_metrics_by_hand() -> None:
    found = metrics(result([float(i) for i in range(101)]))
    assert (found["mean"], found["p50"], found["p95"], found["p99"], found["max"]) == (50, 50, 95, 99, 100)
    assert found["s_per_token"] == 25
    assert found["overhead_us"] == pytest.approx(200)


def test_two_policies_are_compared_seed_by_seed() -> None:
    ours = {0: result([1.0, 3.0]), 1: result([4.0, 4.0], recomputed=7)}
    theirs = {0: result([4.0, 4.0]), 1: result([4.0, 4.0]), 2: result([400.0])}
    found = against(ours, theirs)
    assert found["mean"] == {"ratio": 0.75, "least": 0.5, "most": 1.0}
    assert found["preemptions"]["ratio"] == 1.0
    assert found["recomputed"] == {"ratio": None, "least": 1.0, "most": 1.0}
    assert summary(theirs)["max_of_seeds"] == 400


def test_constants_are_not_reported_on_the_seeds_they_were_chosen_on() -> None:
    assert halves(6) == {"choose": [0, 1, 2], "report": [3, 4, 5]}
    assert halves(1) == {"choose": [0], "report": [0]}
    for count in range(2, 9):
        split = halves(count)
        assert set(split["choose"]).isdisjoint(split["report"])
        assert len(split["choose"]) + len(split["report"]) == count


def trace(folder: Path) -> Path:
    path = folder / "t.csv"
    rows = "".join(f"{i * 0.1},{i % 2},{20 + i},{5 + 40 * (i % 2)}\n" for i in range(60))
    path.write_text("arrival_s,client,input_tokens,output_tokens\n" + rows)
    return path


def test_a_run_is_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("t", (str(trace(tmp_path)),), Arrivals("recorded", load=1.2), ROOM)
    run = Run(case, 0, "fcfs", 30)
    done = execute(run, tmp_path)
    assert done["rate"] > 0
    kept = tmp_path / "runs"
    kept.mkdir()
    (kept / f"{run.key()}.json").write_text(json.dumps(done))
    assert list(execute_all([run], tmp_path, kept, 1)) == [(run, done)]
    assert run.key() != Run(case, 1, "fcfs", 30).key()
    assert run.key() != Run(case, 0, "prompt", 30).key()


def test_the_command_writes_figures_and_distributions(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "out.json", tmp_path / "out.svg"
    arguments = ["--trace", str(trace(tmp_path)), "--requests", "20", "--seeds", "2", "--jobs", "1", "--loads", "1.2"]
    more = ["--blocks", "200", "--seqs", "4", "--policies", "fcfs", "ours", "--runs", str(tmp_path / "runs")]
    assert main([*arguments, *more, "--json", str(out), "--plot", str(plot)]) == 0
    body = json.loads(out.read_text())
    assert body["seeds"] == {"choose": [0], "report": [1]}
    report = body["results"]["report"]["t@1.2"]
    assert report["ours"]["against_fcfs"]["mean"]["ratio"] > 0
    assert report["fcfs"]["against_fcfs"] is None
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "nowhere.csv"], "no trace nowhere.csv"),
        (["--policies", "lifo"], "no policy 'lifo'"),
        (["--policies", "fcfs:kappa=1"], "of `ours` alone"),
        (["--case", "r2"], "no case 'r2'"),
    ],
)
def test_bad_arguments_end_with_two(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_settings_of_ours_are_read_as_json() -> None:
    settings, _ = make_policy("ours:kappa=0.05,victims.enabled=false", EngineSettings(room=ROOM))
    assert settings.additional == {"suite": {"dler": {"kappa": 0.05, "victims": {"enabled": False}}}}


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(tmp_path / "x.svg", {}, "")


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
