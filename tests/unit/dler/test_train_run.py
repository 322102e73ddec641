"""The DLER trainer on TRL: exact arithmetic, exact resuming, and what it refuses.

TRL is in an environment of its own, so everything runs in one child process; these tests look at what it found.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from evaluation import PYTHON

CHILD = Path(__file__).with_name("train_child.py")


def has_trl() -> bool:
    return PYTHON is not None and bool(list(PYTHON.parent.parent.glob("lib/python*/site-packages/trl/__init__.py")))


pytestmark = pytest.mark.skipif(not has_trl(), reason="TRL is not installed; run `make setup`")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dler")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(PYTHON), str(CHILD), str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=environment,
        cwd=CHILD.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


@pytest.mark.parametrize("kind", ["batch", "batch-tokens", "group", "tiers"])
def test_advantages_of_a_step_are_the_recipes(found: dict[str, Any], kind: str) -> None:
    made = found["arithmetic"][kind]
    assert made["advantages"] == pytest.approx(made["expected"], abs=1e-6)
    assert any(made["advantages"])
    assert all(made["informative"])
    assert len(set(made["lengths"])) > 2


def test_the_four_kinds_differ(found: dict[str, Any]) -> None:
    made = found["arithmetic"]
    assert made["batch"]["reward"] == made["batch-tokens"]["reward"] == made["group"]["reward"]
    kinds = [made[kind]["advantages"] for kind in ("batch", "batch-tokens", "group", "tiers")]
    assert all(one != other for i, one in enumerate(kinds) for other in kinds[:i])


def test_a_step_samples_until_it_is_full(found: dict[str, Any]) -> None:
    chosen = found["arithmetic"]["batch"]["chosen"]
    assert chosen["rounds"] >= 2  # a round has 3 prompts, a step 4
    assert chosen["sampled"] == 3 * chosen["rounds"]
    assert chosen["filled"] == 0
    assert chosen["surplus"] == chosen["informative"] - 4


def test_the_loss_is_the_recipes(found: dict[str, Any]) -> None:
    loss = found["arithmetic"]["loss"]
    assert loss["loss"] == pytest.approx(loss["expected"], rel=1e-5)
    assert loss["logged_kl"] == pytest.approx(loss["kl"], rel=1e-5)
    assert loss["low"] < 0.8  # so that both clips and the dual one were at work
    assert loss["high"] > 1.5


def test_a_resumed_run_is_the_same_run(found: dict[str, Any]) -> None:
    resumed = found["resumed"]
    assert resumed["resumed_at"] == 2
    assert resumed["weights_moved"]
    assert resumed["log"] == resumed["log_resumed"]
    assert resumed["weights_equal"]
    assert resumed["before"] == found["whole"]["before"]
    assert resumed["left"] == ["checkpoint-4", "checkpoint-8", "log.jsonl"]  # 2 updates a step; nothing half-written


def test_the_log_says_what_happened(found: dict[str, Any]) -> None:
    for line in found["resumed"]["log"]:
        assert line.keys() >= {"reward", "length", "cut", "entropy", "kl", "clipped", "clipped_low", "clipped_high"}
        assert line.keys() >= {"right", "right_in_time", "groups_kept", "groups_sampled", "rounds", "gradient_norm"}
    assert [line["step"] for line in found["resumed"]["log"]] == [1, 2, 3, 4]


def test_the_report(found: dict[str, Any]) -> None:
    report = found["whole"]
    assert [m["step"] for m in report["measured"]] == [0, 4]
    assert report["before"]["answers"] == 6
    assert report["rows"] == {"trained_on": 34, "too_long": 0}


def test_a_few_steps_shorten_answers(found: dict[str, Any]) -> None:
    before, after = found["shortened"]["before"], found["shortened"]["after"]
    assert before["accuracy"] > 0.25, "the wordy model has not learned its task"
    assert after["length"] <= 0.6 * before["length"]
    assert after["accuracy"] >= before["accuracy"] - 0.1


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("finished", "/resumed holds a finished checkpoint: give another output, or --resume for more steps"),
        ("no_resume", "/resumed/training has checkpoints of a run before: add --resume"),
        ("settings", "checkpoint-8 belongs to a run with other settings: clip_high was 0.28, is 0.5"),
        ("cut_file", "checkpoint-8 is not whole: optimizer.pt has "),
        ("lost_file", "checkpoint-8 is not whole ("),
        ("trl", "unexpected keyword argument 'no_such'"),
    ],
)
def test_what_is_refused(found: dict[str, Any], what: str, told: str) -> None:
    assert told in found["refused"][what]
