"""A conversion needs little memory, whatever the size of the checkpoint or of a weight file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from vllm_swiftkv.convert.layout import expected
from vllm_swiftkv.families import of_model_type

MIB = 2**20
# The size of the largest tensor, a quarter of a weight file, a fifteenth of the checkpoint.
ALLOWED_BYTES = 40 * MIB


@pytest.fixture
def tmp_path(ram: Path) -> Path:
    return ram


def sparse_checkpoint(folder: Path, config: dict[str, object]) -> int:
    """A checkpoint of zeros that takes no disk; returns its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in expected(config, of_model_type("llama")).items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def peak(model: Path, out: Path) -> int:
    """Peak resident bytes of a conversion with means and verification, in a process of its own."""
    command = [sys.executable, "-m", "vllm_suite.cli.main", "swiftkv", "convert", "--model", str(model)]
    command += ["--cut", "0.5", "--group", "2", "--shard-size", "160MiB", "-o", str(out), "--json", f"{out}.json"]
    subprocess.run(command, check=True, timeout=120, stdout=subprocess.DEVNULL)
    return int(json.loads(Path(f"{out}.json").read_text())["peak_rss_bytes"])


def test_peak_memory_does_not_grow_with_the_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    config: dict[str, object] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 4,
        "hidden_size": 2560,
        "intermediate_size": 8192,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "vocab_size": 8192,
    }
    size = sparse_checkpoint(tmp_path / "model", config)
    assert size > 15 * ALLOWED_BYTES
    # Interpreter and libraries are the same in both.
    small = peak(checkpoint("llama", dtype="bfloat16"), tmp_path / "small")
    large = peak(tmp_path / "model", tmp_path / "large")
    print(f"{size / MIB:.0f} MiB: {(large - small) / MIB:.1f} MiB beyond the {small / MIB:.1f} MiB of a tiny one")
    assert len(list((tmp_path / "large").glob("*.safetensors"))) >= 4
    assert large - small < ALLOWED_BYTES
