"""The processes and verbs around a calibration, with a stand-in for the engine's process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.cli.main import main
from vllm_suite.planner.calibrate import engines as module
from vllm_suite.planner.calibrate.client import Timed
from vllm_suite.planner.calibrate.engines import EngineFailed, engines
from vllm_suite.planner.calibrate.file import load
from vllm_suite.planner.calibrate.measure import Options, calibrate, environment, job
from vllm_suite.planner.calibrate.serving import steady_gap
from vllm_suite.planner.sources.calibrated import CalibratedSource
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.validation.cpu import of_result

# Obeys as `step_timing` does; a step takes 10 ms + 1 ms a token + 1 us a key, twice that for the second engine.
STAND_IN = """
import json, sys
job = json.load(open(sys.argv[1]))
if job["engine"]["model"] == "broken":
    sys.exit("no such model")
with open(sys.argv[2], "w") as out:
    def say(line):
        out.write(json.dumps(line) + "\\n"); out.flush()
    say({"ready": {"block_size": 32, "blocks": 4096, "max_model_len": 1024, "max_num_seqs": 8,
                   "max_num_batched_tokens": 256, "async_scheduling": False, "dtype": "float32"}})
    at = 0.0
    for line in sys.stdin:
        command = json.loads(line)
        for index in command["order"][: 3 * len(command["cells"])]:
            cell = command["cells"][index]
            tokens = len(cell["contexts"]) + sum(length for length, _ in cell["chunks"])
            seconds = 0.01 + 1e-3 * tokens + 1e-6 * sum(cell["contexts"])
            seconds *= 2 if command["phase"] == "beside" else 1
            at += seconds
            for odd in (False, True) if tokens == 1 else (False,):
                say({"phase": command["phase"], "at": at, "cell": index, "seconds": 9.0 if odd else seconds,
                     "contexts": cell["contexts"], "as_asked": not odd})
        say({"done": command["phase"]})
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(module, "DRIVER", "stand_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_calibration_from_beginning_to_end(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = stand_in / "engine.yaml"
    words = ["calibrate", "--model", "m", "--device", "cpu", "--engines", "2", "--seconds", "5", "--max-num-seqs", "8"]
    assert main([*words, "-o", str(out), "--json", str(stand_in / "engine.json")]) == 0
    shown = capsys.readouterr()
    assert "alone: held-out error 0.0% in the mean" in shown.out
    found = load(out)
    assert found == load(stand_in / "engine.json")
    assert found.odd_steps > 0
    assert found.engine == {"max_num_seqs": 8}
    assert found.facts["block_size"] == 32
    assert found.provenance["argv"]
    assert {row.phase for row in found.grid} == {"alone", "beside"}
    steps = Steps.of([(100, 64)], [200] * 3)
    expected = 0.01 + 103e-3 + 600e-6
    assert CalibratedSource(found).step_seconds(steps) == pytest.approx(expected, rel=1e-4)
    assert CalibratedSource(found, neighbours=1.0).step_seconds(steps) == pytest.approx(2 * expected, rel=1e-4)


def test_an_engine_that_does_not_start_shows_its_log(stand_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(model="broken", device="cpu")
    with (
        pytest.raises(EngineFailed, match=r"(?s)engine-0 ended with status 1.*no such model"),
        engines([job(options, 0)], stand_in / "logs", environment(options)),
    ):
        pass
    assert main(["calibrate", "--model", "broken", "--device", "cpu", "-o", str(stand_in / "c.yaml")]) == 1
    assert "no such model" in capsys.readouterr().err
    assert not (stand_in / "c.yaml").exists()


def test_too_short_a_run_is_refused(stand_in: Path) -> None:
    text = STAND_IN.replace('[: 3 * len(command["cells"])]', "[:3]")
    (stand_in / "stand_in.py").write_text(text)
    with pytest.raises(ValueError, match="measured cells; a fit needs at least"):
        calibrate(Options(model="m", device="cpu"))


def test_phases_take_turns_and_go_on_where_they_were(stand_in: Path) -> None:
    """Each command visits a third of the cells: four turns reach all of them, in both phases."""
    (stand_in / "stand_in.py").write_text(STAND_IN.replace("3 * len", "len").replace('cells"])]', 'cells"]) // 3]'))
    said: list[str] = []
    found = calibrate(Options(model="m", device="cpu", engines=2), said.append)
    turns = [line.split(", ", 1)[1] for line in said if line.startswith("measuring")]
    assert turns[:3] == ["1 engine(s) at work, turn 1 of 4", "2 engine(s) at work, turn 1 of 4",
                         "1 engine(s) at work, turn 2 of 4"]  # fmt: skip
    assert len(turns) == 8
    alone = next(line for line in said if line.startswith("alone:"))
    assert "0 batches not reached" in alone
    assert {row.phase for row in found.grid} == {"alone", "beside"}


@pytest.mark.parametrize("words", [["--engines", "0"], ["--folds", "1"], ["--engine-args", "[1]"], ["--served", "all"]])
def test_bad_arguments_end_with_two(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--model", "m", "-o", "c.yaml", *words])
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_engines_get_cores_of_their_own_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    two = Options(model="m", device="cpu", engines=2, threads=2)
    assert [job(two, number)["cores"] for number in (0, 1)] == [[0, 1], [2, 3]]
    assert job(Options(model="m", device="cpu", engines=3, threads=2), 0)["cores"] == []
    assert job(Options(model="m", device="gpu"), 0)["cores"] == []
    assert environment(two)["OMP_NUM_THREADS"] == "2"


def test_the_steady_part_of_a_batch_is_where_all_decode() -> None:
    """Two streams: one begins late and slowly, and one gap is long while the other one is already done."""
    first = Timed(8, at=[0.0, *(1.0 + 0.1 * step for step in range(20))])
    second = Timed(8, at=[0.5, *(1.0 + 0.1 * step for step in range(15)), 9.0, 9.1])
    second.at[-2:] = [2.5, 2.6]
    assert steady_gap([first, second]) == pytest.approx(0.1)
    late = Timed(8, at=[2.0 + 0.2 * step for step in range(10)])
    assert steady_gap([late]) == pytest.approx(0.2)
    assert steady_gap([first, Timed(8, at=[5.0 + 0.1 * step for step in range(10)])]) is None


def test_the_validation_reads_a_result() -> None:
    row: dict[str, Any] = {
        "plan": "colocated", "rate": 2.0,
        "predicted": {"ttft_mean": 0.95, "ttft_p99": 1.5, "tpot_mean": 0.02, "tpot_p99": 0.03},
        "measured": {"ttft_mean": 1.0, "ttft_p99": 1.0, "tpot_mean": 0.02, "tpot_p99": 0.03},
    }  # fmt: skip
    held_out = {"mean": 0.04, "p90": 0.1, "worst": 0.2, "worst_cell": "x", "cells": 80, "folds": 5}
    result = {
        "calibration": {"alone": {"held_out": held_out}, "beside": None},
        "rows": [row],
        "winners": [{"rate": 2.0, "by": "ttft_mean", "predicted": "a", "measured": "b", "same": False}],
    }
    found = list(of_result(json.loads(json.dumps(result))))
    assert [each.verdict for each in found] == ["holds", "holds", "missed", "holds", "holds", "missed"]
    assert found[1].error == pytest.approx(-0.05)


def test_the_planner_starts_no_vllm() -> None:
    """The driver is named, not imported."""
    assert module.DRIVER == "vllm_suite.compat.step_timing"
    assert module.DRIVER not in sys.modules
