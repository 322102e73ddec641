"""`vllm-suite demo-epd` as a user runs it: two encoders, prefill, decode, two routers, then one plain engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_suite.fleet.tiny_media import write

_DEADLINE_S = 900


@pytest.mark.timeout(_DEADLINE_S + 60)
def test_pictures_are_encoded_elsewhere_and_change_no_answer(tmp_path: Path) -> None:
    # With a small encoder: the demo's own is slow, so that its times show, and takes most of the start-up.
    model = write("qwen2_5_vl", tmp_path / "model")
    command = [
        sys.executable,
        "-m",
        "vllm_suite.cli.main",
        "demo-epd",
        "--folder",
        str(tmp_path),
        "--model",
        str(model),
    ]
    command += ["--rounds", "1", "--pictures", "4", "--max-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["failures"], report["mismatches"]) == ([], [])
    phases = {phase["name"]: phase for phase in report["phases"]}
    assert phases["mixed"]["encoded"] == 8  # every picture once, although they are shown 15 times
    assert phases["repeated"]["encoded"] == 0
    assert sorted(phases["one encoder"]["encoded_by"].values()) == [0, 4]
    assert sorted(phases["two encoders"]["encoded_by"].values()) == [2, 2]
    assert report["local_encodes"] == 0
    assert not any(phase["refused"] for phase in phases.values())
    # One row of the output for each 28 x 28 pixels, 128 values of 4 bytes.
    assert phases["two encoders"]["bytes_moved"] == 4 * (336 // 28) ** 2 * 128 * 4
    assert report["kv_bytes_moved"] > 0
