"""Everything a DLER run can be told, for the YAML file, the command line and code alike. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_dler.train.grading import TrainError
from vllm_suite.plugin_config import from_file

# What may differ between a run and the one that resumes it: nothing here changes a trained number.
FREE = frozenset({"output", "resume", "steps", "save_every", "keep", "vllm_memory"})
# What GRPOConfig calls the settings that this schema has under its own name, and those that would undo the recipe.
_OURS = {
    "output_dir": "output",
    "max_steps": "steps",
    "num_generations": "group_size",
    "max_completion_length": "max_tokens",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "prompts_per_update",
    "steps_per_generation": "prompts_per_step",
    "generation_batch_size": "prompts_per_step",
    "epsilon": "clip_low",
    "epsilon_high": "clip_high",
    "delta": "dual_clip",
    "beta": "kl",
    "scale_rewards": "advantage",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "max_grad_norm": "gradient_clip",
    "warmup_steps": "warmup",
    "temperature": "temperature",
    "top_p": "top_p",
    "use_vllm": "vllm",
    "vllm_mode": "vllm",
    "vllm_server_base_url": "vllm_server",
    "vllm_gpu_memory_utilization": "vllm_memory",
    "vllm_tensor_parallel_size": "vllm_tensor_parallel",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "seed": "seed",
    "bf16": "precision",
    "gradient_checkpointing": "recompute",
}
_FIXED = frozenset(
    {"loss_type", "mask_truncated_completions", "num_iterations", "save_strategy", "eval_strategy", "shuffle_dataset"}
    | {"reward_weights", "multi_objective_aggregation", "ignore_data_skip", "max_tool_calling_iterations"}
)


class TierSettings(BaseModel):
    """A tier of DA-DLER."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy: float = Field(gt=0, le=1, description="groups with at least this share of right answers")
    max_tokens: int = Field(ge=1, description="tokens that their answers may take")


class DLERConfig(BaseModel):
    """One run. Defaults are the paper's for 1.5B and 7B models (arXiv 2510.15110, section 4 and table 4)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="checkpoint to train: a folder or a name on the Hugging Face hub")
    output: Path = Field(description="folder of the result; checkpoints and the log go into its folder `training`")
    data: list[Path] = Field(min_length=1, description="JSONL or parquet files, or folders of saved datasets")
    prompt_field: str = Field("prompt", description="column of the prompt: a text or a list of chat messages")
    answer_field: str = Field("answer", description="column of the right answer")
    system: str | None = Field(None, description="system message put before prompts that are texts")
    suffix: str = Field("", description='put after prompts that are texts, as " Answer within \\boxed{}."')
    chat: bool = Field(True, description="prompts that are texts become a user's message in the chat template")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are left out, and counted")
    judge: str = Field("boxed", description="boxed, math-verify, or a function as package.module:function")
    think_end: str | None = Field(
        "</think>", description="mark that ends the reasoning; an answer needs it; null: none"
    )

    max_tokens: int = Field(4000, ge=1, description="the truncation length: an answer not ended by then earns nothing")
    partial_credit: float = Field(0.0, ge=0, lt=1, description="share of its reward that a cut answer keeps (paper: 0)")
    tiers: list[TierSettings] = Field([], description="DA-DLER: shorter limits for prompts often answered right")
    advantage: Literal["batch", "batch-tokens", "group"] = Field(
        "batch", description="whiten over the batch's responses (paper), over its tokens (verl), or per group (GRPO)"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="lower clip of the probability ratio, 1 - this")
    clip_high: float = Field(0.28, gt=0, description="upper clip of the probability ratio, 1 + this (paper, 8B: 0.36)")
    dual_clip: float | None = Field(10.0, gt=1, description="bound of the ratio where the advantage is negative")
    dynamic_sampling: bool = Field(True, description="replace groups that are all right or all wrong")
    prompts_per_round: int | None = Field(
        None, ge=1, description="prompts of one round of dynamic sampling (default: three quarters of a step's)"
    )
    max_rounds: int = Field(10, ge=1, description="rounds of dynamic sampling per step, at most")
    on_shortfall: Literal["fill", "stop"] = Field(
        "fill", description="when they were not enough: fill the step with groups that teach nothing, or stop the run"
    )
    kl: float = Field(5e-4, ge=0, description="weight of the KL divergence from the model as it was; 0 for none")
    kl_estimator: Literal["mse", "k3"] = Field("mse", description="per-token estimate of that divergence")

    steps: int = Field(450, ge=1, description="steps; each samples answers once")
    prompts_per_step: int = Field(512, ge=1, description="prompts whose answers a step trains on")
    prompts_per_update: int = Field(64, ge=1, description="prompts of one optimizer update")
    group_size: int = Field(16, ge=2, description="answers per prompt")
    micro_batch: int = Field(4, ge=1, description="answers per forward pass and process")
    lr: float = Field(1e-6, gt=0, description="learning rate of AdamW, constant after the warm-up")
    warmup: int = Field(0, ge=0, description="updates with rising rate")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    gradient_clip: float = Field(1.0, gt=0, description="largest norm of an update's gradient")
    temperature: float = Field(1.0, gt=0, description="of sampling in training")
    top_p: float = Field(1.0, gt=0, le=1, description="of sampling in training")

    vllm: Literal["none", "colocate", "server"] = Field("none", description="what samples: transformers, or vLLM")
    vllm_server: str | None = Field(None, description="address of `trl vllm-serve`, as http://host:8000")
    vllm_memory: float = Field(0.3, gt=0, le=1, description="share of each GPU's memory that a colocated vLLM takes")
    vllm_tensor_parallel: int = Field(1, ge=1, description="tensor-parallel size of a colocated vLLM")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the arithmetic; weights stay float32, else updates of 1e-6 vanish. auto: bf16 on a GPU"
    )
    attention: str = Field("sdpa", description="attention of transformers: sdpa, eager, flash_attention_2, ...")
    recompute: bool = Field(False, description="recompute activations in the backward pass")
    trl: dict[str, Any] = Field({}, description="further settings of TRL's GRPOConfig, as {report_to: wandb}")

    eval_data: list[Path] = Field([], description="data to measure on; default: rows held out of the data")
    eval_rows: int = Field(256, ge=0, description="rows to measure on, at most; 0 measures nothing")
    eval_every: int = Field(0, ge=0, description="steps between measurements; 0: before and after the run only")
    eval_samples: int = Field(1, ge=1, description="answers per measured prompt")
    eval_max_tokens: int | None = Field(
        None, ge=1, description="their longest (default: 8 times max_tokens, as 32k of 4000)"
    )
    eval_temperature: float = Field(0.6, ge=0, description="of their sampling; 0: greedy")
    eval_top_p: float = Field(0.95, gt=0, le=1, description="of their sampling")
    eval_batch: int = Field(256, ge=1, description="answers measured at one time and process")

    seed: int = Field(0, ge=0, description="of the order of the prompts, of sampling, and of the rows held out")
    resume: bool = Field(False, description="go on from the newest checkpoint in the output folder")
    save_every: int = Field(10, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints to keep")

    @model_validator(mode="after")
    def _consistent(self) -> DLERConfig:
        if self.prompts_per_step % self.prompts_per_update:
            raise ValueError(
                f"prompts_per_step {self.prompts_per_step} is no multiple of prompts_per_update "
                f"{self.prompts_per_update}: a step is a whole number of updates"
            )
        if self.prompts_per_update * self.group_size % self.micro_batch:
            raise ValueError(
                f"an update of {self.prompts_per_update} prompts with {self.group_size} answers each cannot be "
                f"split into passes of micro_batch {self.micro_batch}"
            )
        if self.dynamic_sampling and self.round_prompts * self.max_rounds < self.prompts_per_step:
            raise ValueError(
                f"max_rounds {self.max_rounds} of prompts_per_round {self.round_prompts} never make a step of "
                f"prompts_per_step {self.prompts_per_step}"
            )
        if not self.dynamic_sampling and self.prompts_per_round not in (None, self.prompts_per_step):
            raise ValueError("prompts_per_round goes with dynamic_sampling; without it a step is one round")
        for tier in self.tiers:
            if tier.max_tokens > self.max_tokens:
                raise ValueError(f"a tier of {tier.max_tokens} tokens is above max_tokens {self.max_tokens}")
        if len({tier.accuracy for tier in self.tiers}) < len(self.tiers):
            raise ValueError("two tiers have the same accuracy")
        if (self.vllm == "server") != (self.vllm_server is not None):
            raise ValueError("vllm: server and vllm_server go together")
        for key in self.trl:
            if key in _OURS:
                raise ValueError(f"trl.{key}: say it by {_OURS[key]}")
            if key in _FIXED:
                raise ValueError(f"trl.{key}: the recipe fixes it")
        return self

    @property
    def round_prompts(self) -> int:
        """Prompts of one round of sampling. The paper's: 384 where a step has 512."""
        if not self.dynamic_sampling:
            return self.prompts_per_step
        return self.prompts_per_round or max(1, self.prompts_per_step * 3 // 4)

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates on the answers of one sampling."""
        return self.prompts_per_step // self.prompts_per_update

    @property
    def longest_measured(self) -> int:
        """Tokens that a measured answer may take."""
        return self.eval_max_tokens or 8 * self.max_tokens

    def fingerprint(self) -> dict[str, Any]:
        """What a resumed run must share with the one it resumes, as JSON types."""
        values = self.model_dump(mode="json", exclude=set(FREE))
        # Measuring has random numbers of its own, so that how it is done changes no trained number either.
        return {
            name: value
            for name, value in values.items()
            if not name.startswith("eval_") or name in ("eval_data", "eval_rows")
        }


def read(file: Path | None, flags: dict[str, Any]) -> DLERConfig:
    """The configuration of a YAML file and of flags, which win. Raises TrainError that names file and key."""
    return from_file(DLERConfig, file, flags, TrainError)
