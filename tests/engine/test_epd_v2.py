"""EPD on vLLM's V2 model runner, which CPUs have in Triton's interpreter only: a job of its own, of minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm_suite.fleet.tiny_media import write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
REPO = HERE.parents[1]
BACKEND = REPO / "build" / "triton-cpu-interpreter"
Facts = dict[str, Any]


@pytest.fixture(scope="module")
def backend() -> Path:
    """The Triton backend, in a folder of its own: visible elsewhere it would break every other engine."""
    pytest.importorskip("triton", reason="Triton is not installed; vLLM's V2 model runner needs it")
    source = REPO / "packaging" / "triton-cpu-interpreter"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--upgrade"]
    done = subprocess.run(
        [*command, "--target", str(BACKEND), str(source)], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        pytest.skip(f"pip cannot build {source.name} here: {done.stderr.strip().splitlines()[-1]}")
    return BACKEND


@pytest.fixture(scope="module")
def facts(backend: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What the engines answered; see `v2_scenarios`, which is run with the backend in its path."""
    folder = tmp_path_factory.mktemp("v2")
    model, answer = write("qwen2_5_vl", folder / "tiny"), folder / "facts.json"
    path = os.pathsep.join([str(backend), str(HERE)])
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(HERE / "v2_scenarios.py"), str(model), str(answer)],
        env=env,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: Facts = json.loads(answer.read_text())
    return found


def test_both_runners_answer_the_same(facts: Facts) -> None:
    v2, v1 = facts["whole"]["v2"], facts["whole"]["v1"]
    assert v2["runner"] == "vllm.v1.worker.cpu.model_runner.CPUModelRunner"
    assert v1["runner"] == "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
    assert [a["tokens"] for a in v2["answers"]] == [a["tokens"] for a in v1["answers"]]


def test_an_encoder_and_a_consumer_answer_as_one_engine(facts: Facts) -> None:
    apart = facts["apart"]
    assert apart["runners"] == ["v2_scenarios.CPUEncoderRunner", "vllm.v1.worker.cpu.model_runner.CPUModelRunner"]
    assert apart["answers"] == facts["whole"]["v2"]["answers"]


def test_requests_together_answer_as_alone_and_the_consumer_encodes_nothing(facts: Facts) -> None:
    assert facts["apart"]["batch"] == facts["apart"]["alone"]
    assert facts["apart"]["encoded by the consumer"] == 0


def test_a_known_item_costs_no_encode(facts: Facts) -> None:
    assert facts["apart"]["encoded again"] == 0


def test_a_whole_instance_encodes_for_a_consumer(facts: Facts) -> None:
    assert facts["any"]["answers"] == facts["any"]["by itself"] == facts["whole"]["v2"]["answers"]
    assert facts["any"]["encoded by the consumer"] == 0
