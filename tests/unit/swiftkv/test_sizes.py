"""Sizes from a config are those of real checkpoints, and of the published models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from swiftkv_checkpoints import make_swiftkv_checkpoint

from vllm_suite.cli.main import main
from vllm_swiftkv.families import FAMILIES
from vllm_swiftkv.sizes import sizes, split_of

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.base_model_type)
@pytest.mark.parametrize("group", [1, 2])
def test_a_checkpoint_holds_what_its_config_says(tmp_path: Path, family: Any, group: int) -> None:
    path = make_swiftkv_checkpoint(tmp_path / "m", family.base_model_type, layers=8, cut=4, group=group)
    config = json.loads((path / "config.json").read_text())
    held = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            # The reference maker gives every tail layer a k_norm; only a leader's is ever used.
            unused = [f"model.layers.{i}.self_attn.k_norm.weight" for i in range(4, 8) if (i - 4) % group]
            held += sum(math.prod(tensors.get_slice(k).get_shape()) for k in tensors.keys() if k not in unused)  # noqa: SIM118
    assert sizes(config, *split_of(config, None, None)).swiftkv == held


def test_published_models() -> None:
    small, big = sizes(LLAMA_8B, 16, 1), sizes(LLAMA_70B, 40, 1)
    assert small.ordinary == 8_030_261_248  # the published parameter counts
    assert big.ordinary == 70_553_706_496
    assert small.swiftkv == small.ordinary + 4096
    # What the dead q, k and v of the 70B tail would take in bf16: 6.7 GB.
    assert (big.with_teacher - big.swiftkv) * 2 / 1e9 == pytest.approx(6.71, abs=0.01)
    assert 0.50 < small.prefill_only / small.ordinary < 0.56
    assert sizes(LLAMA_8B, 16, 4).kv_swiftkv / small.kv_ordinary == 20 / 32


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_8B))
    out = tmp_path / "out.json"
    assert main(["swiftkv", "sizes", "--model", str(config), "--group", "4", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["split"] == {"layers": 32, "cut": 16, "group": 4}
    assert "8,030,261,248" in capsys.readouterr().out
    config.write_text(json.dumps(LLAMA_8B | {"model_type": "gpt2"}))
    assert main(["swiftkv", "sizes", "--model", str(config)]) == 2
    assert "gpt2" in capsys.readouterr().err
    assert main(["swiftkv", "sizes", "--model", str(tmp_path / "none")]) == 2
