"""The whole of it: a wordy model, shortened by `vllm-suite dler train` to less than half, and no less accurate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wordy_sums
import yaml
from test_train_run import has_trl

pytestmark = [
    pytest.mark.skipif(not has_trl(), reason="TRL is not installed; run `make setup`"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]


def test_half_the_length_at_no_less_accuracy(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wordy_sums.prepare(tmp_path, steps=250)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(wordy_sums.dler_settings(tmp_path)))
    command = [sys.executable, "-m", "vllm_suite.cli.main", "dler", "train", str(tmp_path / "run.yaml")]
    command += ["-o", str(tmp_path / "out"), "--json", str(tmp_path / "report.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["accuracy"] > 0.7, "the wordy model has not learned its task"
    assert after["length"] <= 0.5 * before["length"]
    assert after["accuracy"] >= before["accuracy"]
    assert after["cut"] <= before["cut"]
    assert f"mean length: {before['length']:.1f} -> {after['length']:.1f} tokens" in done.stdout
    log = [json.loads(line) for line in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert sum("reward" in entry for entry in log) == report["steps"]
