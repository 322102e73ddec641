"""The same run as settings of verl 0.9.1 or OpenRLHF 0.11.2, as a shell script.

Both have four of the recipe's five parts as options. What one of them cannot do is an error, not a comment: a file
that trains something else under the same name would be worse than none.
"""

from __future__ import annotations

import re
import shlex
from typing import Any, Literal

from vllm_dler.train.config import DLERConfig
from vllm_dler.train.grading import TrainError

_HEAD = """#!/usr/bin/env bash
# DLER as settings of {name}, written by `vllm-suite dler train --emit {kind}`.
{notes}
set -euo pipefail
"""


def emit(config: DLERConfig, kind: Literal["verl", "openrlhf"]) -> str:
    """The script. Raises TrainError for a setting that the other trainer has no counterpart of."""
    if config.tiers:
        raise TrainError(f"tiers: {kind} has no difficulty-aware truncation; train with `vllm-suite dler train`")
    if config.advantage == "batch":
        raise TrainError(f"advantage batch: {kind} whitens over tokens; say advantage: batch-tokens to accept that")
    if len(config.data) != 1 or len(config.eval_data) > 1:
        raise TrainError(f"data: one file for {kind}, and at most one of eval_data; concatenate them first")
    for name in ("system", "suffix"):
        if getattr(config, name):
            raise TrainError(f"{name}: {kind} reads prompts as they are; put it into the data")
    if not config.chat:
        raise TrainError(f"chat false: {kind} would put the prompts through the chat template")
    return _verl(config) if kind == "verl" else _openrlhf(config)


def _verl(config: DLERConfig) -> str:
    grpo = config.advantage == "group"
    settings: dict[str, Any] = {
        "data.train_files": config.data[0],
        "data.val_files": (config.eval_data or config.data)[0],
        "data.prompt_key": config.prompt_field,
        "data.max_prompt_length": config.max_prompt_tokens,
        "data.filter_overlong_prompts": True,
        "data.max_response_length": config.max_tokens,
        "data.train_batch_size": config.prompts_per_step,
        "data.seed": config.seed,
        "algorithm.adv_estimator": "grpo" if grpo else "reinforce_plus_plus_baseline",
        "algorithm.filter_groups.enable": config.dynamic_sampling,
        "algorithm.filter_groups.metric": "reward",
        "algorithm.use_kl_in_reward": False,
        "actor_rollout_ref.model.path": config.model,
        "actor_rollout_ref.model.enable_gradient_checkpointing": config.recompute,
        "actor_rollout_ref.actor.ppo_mini_batch_size": config.prompts_per_update,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": config.micro_batch,
        "actor_rollout_ref.actor.ppo_epochs": 1,
        "actor_rollout_ref.actor.clip_ratio_low": config.clip_low,
        "actor_rollout_ref.actor.clip_ratio_high": config.clip_high,
        # verl always has a dual clip; no ratio comes near this one.
        "actor_rollout_ref.actor.clip_ratio_c": config.dual_clip or 1e6,
        "actor_rollout_ref.actor.loss_agg_mode": "token-mean",
        "actor_rollout_ref.actor.entropy_coeff": 0,
        "actor_rollout_ref.actor.use_kl_loss": config.kl > 0,
        "actor_rollout_ref.actor.kl_loss_coef": config.kl,
        "actor_rollout_ref.actor.kl_loss_type": {"mse": "mse", "k3": "low_var_kl"}[config.kl_estimator],
        "actor_rollout_ref.actor.optim.lr": config.lr,
        "actor_rollout_ref.actor.optim.lr_scheduler_type": "constant",
        "actor_rollout_ref.actor.optim.lr_warmup_steps": config.warmup,
        "actor_rollout_ref.actor.optim.weight_decay": config.weight_decay,
        "actor_rollout_ref.actor.optim.clip_grad": config.gradient_clip,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.n": config.group_size,
        "actor_rollout_ref.rollout.temperature": config.temperature,
        "actor_rollout_ref.rollout.top_p": config.top_p,
        "actor_rollout_ref.rollout.gpu_memory_utilization": config.vllm_memory,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": config.vllm_tensor_parallel,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": config.micro_batch,
        "actor_rollout_ref.rollout.val_kwargs.do_sample": config.eval_temperature > 0,
        "actor_rollout_ref.rollout.val_kwargs.temperature": config.eval_temperature,
        "actor_rollout_ref.rollout.val_kwargs.top_p": config.eval_top_p,
        "actor_rollout_ref.rollout.val_kwargs.n": config.eval_samples,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": config.micro_batch,
        "reward.custom_reward_function.path": "pkg://vllm_dler.train.cluster_rewards",
        "reward.custom_reward_function.name": "compute_score",
        "+reward.custom_reward_function.reward_kwargs.judge": config.judge,
        "+reward.custom_reward_function.reward_kwargs.think_end": config.think_end,
        "reward.reward_manager.source": "importlib",
        "reward.reward_manager.name": "TruncationRewardManager",
        "reward.reward_manager.module.path": "pkg://vllm_dler.train.verl_reward",
        "+reward.reward_kwargs.partial_credit": config.partial_credit,
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": 1_000_000,  # the steps end the run
        "trainer.save_freq": config.save_every,
        "trainer.max_actor_ckpt_to_keep": config.keep,
        "trainer.test_freq": config.eval_every or -1,
        "trainer.default_local_dir": "checkpoints",
        "trainer.project_name": "dler",
        "trainer.experiment_name": "dler",
        "trainer.logger": "[console]",
    }
    if grpo:
        settings["algorithm.norm_adv_by_std_in_grpo"] = True
    words = [f"{key}={_hydra(value)}" for key, value in settings.items()]
    notes = (
        "# Data: parquet with the columns prompt (list of messages), data_source, and reward_model.ground_truth.\n"
        "# Every node needs vllm-suite installed beside verl. What is given as arguments is added: trainer.nnodes=8.\n"
        "# Whitening is over tokens; measured answers are cut where trained ones are; prompts are replaced one by\n"
        "# one, without a limit on rounds."
    )
    return _script("verl 0.9.1", "verl", notes, "python3 -m verl.trainer.main_ppo", words)


def _openrlhf(config: DLERConfig) -> str:
    options: dict[str, Any] = {
        "actor.model_name_or_path": config.model,
        "data.prompt_dataset": config.data[0],
        "data.input_key": config.prompt_field,
        "data.label_key": config.answer_field,
        "data.apply_chat_template": True,
        "data.max_len": config.max_prompt_tokens + config.max_tokens,
        "rollout.max_new_tokens": config.max_tokens,
        "rollout.batch_size": config.prompts_per_step,
        "rollout.n_samples_per_prompt": config.group_size,
        "rollout.temperature": config.temperature,
        "rollout.top_p": config.top_p,
        "train.batch_size": config.prompts_per_update * config.group_size,
        "train.micro_batch_size": config.micro_batch,
        "train.max_epochs": 1,
        "train.num_episodes": 1_000_000,
        "train.seed": config.seed,
        "algo.advantage.estimator": "group_norm" if config.advantage == "group" else "reinforce_baseline",
        "algo.kl.use_loss": config.kl > 0,
        "algo.kl.init_coef": config.kl,
        "algo.kl.estimator": {"mse": "k2", "k3": "k3"}[config.kl_estimator],
        "algo.dynamic_filtering_enable": config.dynamic_sampling,
        "algo.dynamic_filtering_range": [0, 1] if config.dynamic_sampling else False,
        "actor.eps_clip_low_high": [config.clip_low, config.clip_high],
        "actor.dual_clip": config.dual_clip,
        "actor.loss_agg_mode": "token-mean",
        "actor.adam.lr": config.lr,
        "actor.adam.betas": [0.9, 0.999],
        "actor.adam.weight_decay": config.weight_decay,
        "actor.lr_scheduler": "constant_with_warmup",
        "actor.lr_warmup_ratio": 0,
        "actor.max_norm": config.gradient_clip,
        "actor.gradient_checkpointing_enable": config.recompute,
        "reward.remote_url": '"$here/reward.py"',
        "reward.stop_properly_penalty_coef": config.partial_credit,
        "vllm.tensor_parallel_size": config.vllm_tensor_parallel,
        "vllm.gpu_memory_utilization": config.vllm_memory,
        "ckpt.save_steps": config.save_every,
        "ckpt.max_num": config.keep,
        "ckpt.output_dir": "checkpoints",
        "ckpt.load_enable": config.resume,
    }
    if config.eval_data:
        options |= {
            "eval.dataset": config.eval_data[0],
            "eval.steps": config.eval_every or -1,
            "eval.temperature": config.eval_temperature,
            "eval.n_samples_per_prompt": config.eval_samples,
        }
    words = [_option(name, value) for name, value in options.items() if value is not None and value is not False]
    judge = f"reward_func = openrlhf_reward({config.judge!r}, {config.think_end!r})"
    notes = (
        "# Needs --vllm.num_engines and the numbers of nodes and GPUs, given as arguments, and vllm-suite installed\n"
        "# beside OpenRLHF on every node. It has no number of steps: stop it, or give --train.num_episodes.\n"
        "# Whitening is over tokens, and groups are filtered by the judge's score before the truncation."
    )
    file = (
        'here="$(cd "$(dirname "$0")" && pwd)"\n'
        "cat >\"$here/reward.py\" <<'END'\n"
        f"from vllm_dler.train.cluster_rewards import openrlhf_reward\n\n{judge}\nEND\n"
    )
    return _script("OpenRLHF 0.11.2", "openrlhf", notes, "python3 -m openrlhf.cli.train_ppo_ray", words, file)


def _script(name: str, kind: str, notes: str, command: str, words: list[str], before: str = "") -> str:
    lines = " \\\n".join([command, *(f"  {word}" for word in words), '  "$@"'])
    return _HEAD.format(name=name, kind=kind, notes=notes) + before + lines + "\n"


def _hydra(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value)
    text = str(value)
    # Text with marks of Hydra's own grammar is quoted for it, and all of it for the shell.
    plain = isinstance(value, (int, float)) or text.startswith(("[", "pkg://"))
    if not plain and set(text) & set("=,:(){}<>\\'\" "):
        # Hydra reads a backslash as itself but before a quote.
        text = "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", "\\'"), text) + "'"
    return shlex.quote(text)


def _option(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    values = value if isinstance(value, list) else [value]
    return " ".join([f"--{name}", *(v if str(v).startswith('"$') else shlex.quote(str(v)) for v in values)])
