"""What a run may be told, what is refused, and what the command says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_dler.train.config import DLERConfig, read
from vllm_dler.train.grading import TrainError
from vllm_suite.cli.main import main

NEEDED: dict[str, Any] = {"model": "some/model", "output": "out", "data": ["rows.jsonl"]}


def test_the_defaults_are_the_papers() -> None:
    config = DLERConfig(**NEEDED)
    assert (config.max_tokens, config.partial_credit, config.advantage) == (4000, 0.0, "batch")
    assert (config.clip_low, config.clip_high, config.dual_clip) == (0.2, 0.28, 10.0)
    assert (config.prompts_per_step, config.round_prompts, config.group_size) == (512, 384, 16)
    assert (config.prompts_per_update, config.updates_per_step) == (64, 8)
    assert (config.lr, config.weight_decay, config.warmup, config.gradient_clip) == (1e-6, 0.01, 0, 1.0)
    assert (config.kl, config.kl_estimator, config.temperature, config.top_p) == (5e-4, "mse", 1.0, 1.0)
    assert (config.eval_temperature, config.eval_top_p, config.longest_measured) == (0.6, 0.95, 32000)
    assert config.max_prompt_tokens == 1024


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"clip": 0.2}, "clip: no such setting"),
        ({"tiers": [{"accuracy": 0.5, "tokens": 9}]}, r"tiers\.0\.tokens: no such setting"),
        ({"group_size": 1}, "group_size: .* greater than or equal to 2"),
        ({"prompts_per_update": 60}, "512 is no multiple of prompts_per_update 60"),
        ({"micro_batch": 3}, "micro_batch 3"),
        ({"max_rounds": 1}, "max_rounds 1 of prompts_per_round 384 never make"),
        ({"dynamic_sampling": False, "prompts_per_round": 9}, "goes with dynamic_sampling"),
        ({"tiers": [{"accuracy": 0.5, "max_tokens": 5000}]}, "tier of 5000 tokens is above max_tokens 4000"),
        ({"tiers": [{"accuracy": 0.5, "max_tokens": 9}] * 2}, "two tiers have the same accuracy"),
        ({"vllm": "server"}, "vllm_server go together"),
        ({"trl": {"epsilon": 0.1}}, r"trl\.epsilon: say it by clip_low"),
        ({"trl": {"loss_type": "grpo"}}, r"trl\.loss_type: the recipe fixes it"),
        ({"advantage": "token"}, "advantage: .*'batch-tokens'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainError, match=told):
        read(None, NEEDED | change)


def test_a_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: m\noutput: out\ndata: [rows.jsonl]\nmax_tokens: 100\n")
    assert read(file, {}).max_tokens == 100
    assert read(file, {"max_tokens": "200"}).max_tokens == 200
    file.write_text("model: m\nmax_tokens: many\n")
    with pytest.raises(TrainError) as error:
        read(file, {"data": ["x"]})
    assert f"{file}: output: Field required" in str(error.value)
    assert f"{file}: max_tokens: " in str(error.value)
    file.write_text("- a\n")
    with pytest.raises(TrainError, match="is no mapping of settings"):
        read(file, {})


def test_what_changes_no_number_may_differ_on_resuming() -> None:
    base = DLERConfig(**NEEDED)
    free = {"output": "x", "resume": True, "save_every": 3, "keep": 9, "steps": 900, "eval_every": 5, "eval_batch": 2}
    assert DLERConfig(**(NEEDED | free)).fingerprint() == base.fingerprint()
    for change in ({"clip_high": 0.3}, {"eval_rows": 3}, {"group_size": 8}, {"seed": 1}, {"vllm": "colocate"}):
        assert DLERConfig(**(NEEDED | change)).fingerprint() != base.fingerprint()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--model", "m"], "output: Field required"),
        (["--model", "m", "-o", "out", "--data", "d", "--tiers", "[{accuracy: 2, max_tokens: 3}]"], "tiers.0.accuracy"),
    ],
)
def test_the_command_says_what_is_wrong(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dler", "train", *words]) == 2
    assert told in capsys.readouterr().err


def test_the_settings_in_the_manual_are_valid(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "dler-training.md").read_text()
    file = tmp_path / "run.yaml"
    file.write_text(text.split("```yaml\n")[1].split("```")[0])
    config = read(file, {})
    assert config.suffix == " Put the final answer within \\boxed{}."
    assert (config.vllm, config.max_tokens) == ("colocate", 4000)
