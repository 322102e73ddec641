"""An engine whose only requests wait for encoder outputs sleeps until one comes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from child import ENGINE_ENV

from vllm_suite.fleet.tiny_media import write

HERE = Path(__file__).parent
Asked = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Seconds and scheduling attempts of one request each, by how long the KV connector lets the engine sleep."""
    model = write("qwen2_5_vl", tmp_path_factory.mktemp("model") / "tiny")
    env = os.environ | ENGINE_ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(HERE)}
    answer = model.parent / "asked.json"
    command = [sys.executable, str(HERE / "idle_connectors.py"), str(model), str(answer)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: Asked = json.loads(answer.read_text())
    return facts


def test_it_sleeps_where_no_connector_has_anything_to_do_and_is_woken(asked: Asked) -> None:
    # vLLM itself would try about a thousand times a second; the sleep asked for is 30 s.
    assert asked["inf"]["polls"] < 30
    assert 2.0 <= asked["inf"]["seconds"] < 20


def test_the_shorter_wait_of_the_two_connectors_counts(asked: Asked) -> None:
    assert asked["inf"]["polls"] < asked["0.1"]["polls"] < 40


def test_it_stays_awake_where_one_of_them_asks_for_that(asked: Asked) -> None:
    assert asked["0"]["polls"] > 3 * asked["0.1"]["polls"]
