"""The recipe as settings of verl and OpenRLHF.

Every option name was looked up in the wheels named in `clusters`; neither is installed here.
"""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from vllm_dler.train import cluster_rewards
from vllm_dler.train.clusters import emit
from vllm_dler.train.config import DLERConfig
from vllm_dler.train.grading import TrainError
from vllm_suite.cli.main import main

NEEDED: dict[str, Any] = {"model": "some/model", "output": "o", "data": ["a b.parquet"], "advantage": "batch-tokens"}


def words(script: str) -> list[str]:
    """The arguments of the script's last command."""
    return shlex.split(script[script.rindex("\npython3 ") :].replace('"$@"', "").replace("\\\n", " "))


def test_verl_has_the_recipe() -> None:
    got = words(emit(DLERConfig(**NEEDED), "verl"))
    assert got[:3] == ["python3", "-m", "verl.trainer.main_ppo"]
    settings = dict(word.split("=", 1) for word in got[3:])
    recipe = {
        "algorithm.adv_estimator": "reinforce_plus_plus_baseline",
        "algorithm.filter_groups.enable": "True",
        "algorithm.filter_groups.metric": "reward",
        "actor_rollout_ref.actor.clip_ratio_low": "0.2",
        "actor_rollout_ref.actor.clip_ratio_high": "0.28",
        "actor_rollout_ref.actor.clip_ratio_c": "10.0",
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "actor_rollout_ref.actor.kl_loss_type": "mse",
        "actor_rollout_ref.actor.kl_loss_coef": "0.0005",
        "actor_rollout_ref.rollout.n": "16",
        "data.max_response_length": "4000",
        "data.train_batch_size": "512",
        "actor_rollout_ref.actor.ppo_mini_batch_size": "64",  # prompts, as verl counts
        "reward.reward_manager.name": "TruncationRewardManager",
        "+reward.custom_reward_function.reward_kwargs.think_end": "'</think>'",
        "data.train_files": "'a b.parquet'",
    }
    assert recipe.items() <= settings.items()
    assert settings["reward.reward_manager.module.path"] == "pkg://vllm_dler.train.verl_reward"


def test_openrlhf_has_the_recipe() -> None:
    got = words(emit(DLERConfig(**NEEDED), "openrlhf"))
    text = " ".join(got)
    for option in (
        "--algo.advantage.estimator reinforce_baseline ",
        "--reward.stop_properly_penalty_coef 0.0 ",
        "--actor.eps_clip_low_high 0.2 0.28 ",
        "--actor.dual_clip 10.0 ",
        "--algo.dynamic_filtering_enable --algo.dynamic_filtering_range 0 1 ",
        "--algo.kl.use_loss --algo.kl.init_coef 0.0005 --algo.kl.estimator k2 ",
        "--train.batch_size 1024 ",  # answers, as OpenRLHF counts: 64 prompts of 16
        "--rollout.batch_size 512 ",
        "--data.max_len 5024 ",
    ):
        assert option in text
    assert "--data.prompt_dataset" in got
    assert got[got.index("--data.prompt_dataset") + 1] == "a b.parquet"


@pytest.mark.parametrize("kind", ["verl", "openrlhf"])
def test_the_script_is_one(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bash accepts it, and the trainer gets the words that we meant: the trainer is replaced by one that prints."""
    target = tmp_path / "run.sh"
    flags = ["--model", "it's/a model", "--data", "a b.parquet", "--advantage", "batch-tokens", "--max-tokens", "64"]
    assert main(["dler", "train", "--emit", kind, "-o", str(target), *flags]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    shown = tmp_path / "python3"
    shown.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done\n')
    shown.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", str(target), "more words"], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    got = done.stdout.splitlines()
    assert got[-1] == "more words"
    if kind == "openrlhf":
        assert got[got.index("--actor.model_name_or_path") + 1] == "it's/a model"
        assert got[got.index("--reward.remote_url") + 1] == str(tmp_path / "reward.py")
        module: dict[str, Any] = {}
        exec(compile((tmp_path / "reward.py").read_text(), "reward.py", "exec"), module)
        scored = module["reward_func"](["Q?x</think>\\boxed{4}</s>"], ["Q?"], ["4"])
        assert scored["scores"].tolist() == [1.0]
    else:
        assert "actor_rollout_ref.model.path='it\\'s/a model'" in got
        assert "data.max_response_length=64" in got


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"advantage": "batch"}, "whitens over tokens; say advantage: batch-tokens"),
        ({"tiers": [{"accuracy": 0.5, "max_tokens": 5}]}, "no difficulty-aware truncation"),
        ({"data": ["a", "b"]}, "one file"),
        ({"suffix": " Think."}, "suffix: .* put it into the data"),
        ({"chat": False}, "chat template"),
    ],
)
@pytest.mark.parametrize("kind", ["verl", "openrlhf"])
def test_what_they_cannot_do_is_an_error(kind: Any, change: dict[str, Any], told: str) -> None:
    with pytest.raises(TrainError, match=told):
        emit(DLERConfig(**(NEEDED | change)), kind)


def test_the_reward_of_verl() -> None:
    score = cluster_rewards.compute_score
    assert score("d", "x</think>\\boxed{4}", "4", {}) == 1
    assert score("d", "\\boxed{4}", "4", None, judge="boxed", think_end="</think>", reward_router_address="x") == 0
    assert score("d", "\\boxed{4}", "4", think_end=None) == 1
