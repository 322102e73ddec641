"""Encoders of vLLM's own models, without an engine: the rows of slices are those of the whole item, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "slices_child.py"
ENV = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
ITEMS = {"internvl": 2, "internvl_chat": 2, "qwen2_5_vl": 3, "qwen3_vl": 3}


@pytest.mark.parametrize(
    "family", ["qwen3_vl", *(pytest.param(name, marks=pytest.mark.slow) for name in ITEMS if name != "qwen3_vl")]
)
def test_slices_are_the_item_bit_by_bit(family: str, tmp_path: Path) -> None:
    env = {**os.environ, **ENV, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, str(CHILD), family, str(tmp_path / family)]
    child = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.count("equal ") == 2 * ITEMS[family], child.stdout
