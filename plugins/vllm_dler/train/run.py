"""A whole DLER run, on one CPU or under ``accelerate launch`` on many GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from vllm_dler.train import checkpoints
from vllm_dler.train.config import DLERConfig
from vllm_dler.train.grading import TrainError, make_judge
from vllm_dler.train.progress import Progress
from vllm_dler.train.rows import Row, read_rows, split
from vllm_dler.train.trainer import DLERTrainer

WORK = "training"  # folder within the output for checkpoints and the log

# Of what the trainer logs, what goes into log.jsonl, under these names.
_LOGGED = {
    "reward": "reward",
    "answers/right": "right",
    "answers/right_in_time": "right_in_time",
    "answers/length": "length",
    "answers/cut": "cut",
    "entropy": "entropy",
    "kl": "kl",
    "clip_ratio/low_mean": "clipped_low",
    "clip_ratio/high_mean": "clipped_high",
    "clip_ratio/region_mean": "clipped",
    "groups/sampled": "groups_sampled",
    "groups/kept": "groups_kept",
    "groups/all_right": "groups_all_right",
    "groups/all_wrong": "groups_all_wrong",
    "groups/filled": "groups_filled",
    "groups/surplus": "groups_surplus",
    "rounds": "rounds",
    "loss": "loss",
    "grad_norm": "gradient_norm",
    "learning_rate": "lr",
}


def train(config: DLERConfig) -> dict[str, Any]:
    """Train, write the checkpoint to ``config.output`` and return the report.

    Raises TrainError for anything wrong with settings, checkpoint or data, before a step is taken where it can be
    known by then. What a stopped run has saved, the same call with ``resume=True`` goes on from.
    """
    judge = make_judge(config.judge, config.think_end)
    transformers.utils.logging.disable_progress_bar()
    work = config.output / WORK
    tokenizer = _tokenizer(config)
    rows, held, dropped = _rows(config, tokenizer)
    arguments = _arguments(config, work)
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        _check_output(config, work)
    trainer = DLERTrainer(
        config,
        rows,
        judge,
        model=_model(config),
        args=arguments,
        train_dataset=_pace(config, rows),
        processing_class=tokenizer,
    )
    trainer.accelerator.wait_for_everyone()
    trainer.fingerprint = config.fingerprint() | {
        "rows": len(rows),
        "processes": trainer.accelerator.num_processes,
    }
    return _Run(config, trainer, held, work).run() | {"rows": {"trained_on": len(rows), "too_long": dropped}}


class _Run(TrainerCallback):
    def __init__(self, config: DLERConfig, trainer: DLERTrainer, held: list[Row], work: Path) -> None:
        self.config, self.trainer, self.held, self.work = config, trainer, held, work
        self.main = trainer.accelerator.is_main_process
        self.measured: list[dict[str, float]] = []
        self.seconds = {"measuring": 0.0}
        self._log: Any = None
        self._progress: Progress | None = None
        self._began = time.monotonic()

    def run(self) -> dict[str, Any]:
        trainer, config = self.trainer, self.config
        newest = checkpoints.found(self.work)[-1:]
        if newest and not config.resume:
            raise TrainError(f"{self.work} has checkpoints of a run before: add --resume, or give another output")
        first, resume = 0, None
        if newest:
            state = checkpoints.read_state(newest[0], trainer.fingerprint)
            first, resume = int(state["step"]), str(newest[0])
            trainer.stream.position = int(state["position"])
        trainer.remove_callback(PrinterCallback)  # the log and the progress say it
        trainer.add_callback(self)
        with self._logged(first), Progress(config.steps, first, self.main) as self._progress:
            self.measured = self._measured_before(first)
            if not first:
                self._measure(0)
            self._began = time.monotonic()
            if first < config.steps:
                trainer.train(resume_from_checkpoint=resume)
            elif resume is not None:
                trainer._load_from_checkpoint(resume)
            if first < config.steps and (not self.measured or self.measured[-1]["step"] != config.steps):
                self._measure(config.steps)
        self._write()
        return {
            "model": config.model,
            "output": str(config.output),
            "steps": config.steps,
            "resumed_at": first or None,
            "before": next((m for m in self.measured if m["step"] == 0), None),
            "after": next((m for m in self.measured if m["step"] == config.steps), None),
            "measured": self.measured,
            "seconds": time.monotonic() - self._began,
            "seconds_measuring": self.seconds["measuring"],
            "processes": trainer.accelerator.num_processes,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "settings": trainer.fingerprint,
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """One line per step."""
        if not self.main or logs is None or "loss" not in logs:
            return
        step = state.global_step // self.config.updates_per_step
        entry = {"step": step} | {new: logs[old] for old, new in _LOGGED.items() if old in logs}
        entry["seconds"] = round(time.monotonic() - self._began, 3)
        self._append(entry)
        if self._progress is not None:
            self._progress.step(entry)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure where it is time to."""
        step, rest = divmod(state.global_step, self.config.updates_per_step)
        every = self.config.eval_every
        if not rest and every and step % every == 0 and step < self.config.steps:
            self._measure(step)

    def _measure(self, step: int) -> None:
        if not self.held:
            return
        began = time.monotonic()
        entry = {"step": step, **self.trainer.measure(self.held)}
        self.seconds["measuring"] += time.monotonic() - began
        self.measured.append(entry)
        self._append({"measured": True, **entry})
        if self._progress is not None:
            self._progress.say(
                f"step {step}: accuracy {entry['accuracy']:.1%}, {entry['length']:.1f} tokens, {entry['cut']:.1%} cut"
            )

    def _append(self, entry: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(json.dumps(entry) + "\n")
            self._log.flush()

    def _measured_before(self, first: int) -> list[dict[str, float]]:
        """What the run measured up to the step that it goes on from."""
        if not first:
            return []
        lines = (self.work / "log.jsonl").read_text().splitlines() if (self.work / "log.jsonl").is_file() else []
        entries = (json.loads(line) for line in lines)
        return [{k: v for k, v in e.items() if k != "measured"} for e in entries if e.get("measured")]

    @contextlib.contextmanager
    def _logged(self, first: int) -> Iterator[None]:
        """The log, one JSON object per line, without lines of steps that are taken again."""
        if not self.main:
            yield
            return
        file = self.work / "log.jsonl"
        kept = []
        for line in file.read_text().splitlines() if file.is_file() and first else []:
            with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
                if json.loads(line)["step"] <= first:
                    kept.append(line)
        partial = file.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        os.replace(partial, file)
        with file.open("a") as self._log:
            yield
        self._log = None

    def _write(self) -> None:
        """The result: the model in the format that it came in, with its tokenizer."""
        target = self.config.output
        self.trainer.save_model(str(target))
        if self.main:
            for name in ("training_args.bin",):  # a pickle of settings that the log and the report hold as text
                (target / name).unlink(missing_ok=True)
        self.trainer.accelerator.wait_for_everyone()


def _tokenizer(config: DLERConfig) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model, padding_side="left")
    except (OSError, ValueError) as error:
        raise TrainError(f"model {config.model}: its tokenizer cannot be read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _model(config: DLERConfig) -> Any:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, attn_implementation=config.attention
        )
    except (OSError, ValueError) as error:
        raise TrainError(f"model {config.model} cannot be read: {error}") from error
    return model


def _rows(config: DLERConfig, tokenizer: Any) -> tuple[list[Row], list[Row], int]:
    rows = read_rows(config.data, config)
    if config.eval_data:
        held = read_rows(config.eval_data, config)[: config.eval_rows]
    else:
        rows, held = split(rows, config.eval_rows, config.seed)
    if any(not isinstance(row.prompt, str) for row in rows + held) and tokenizer.chat_template is None:
        raise TrainError(f"{config.model} has no chat template: set chat to false, and give prompts as texts")
    fitting = [row for row in rows if _prompt_tokens(row, tokenizer) <= config.max_prompt_tokens]
    if not fitting:
        raise TrainError(f"no prompt has at most max_prompt_tokens {config.max_prompt_tokens} tokens")
    return fitting, held, len(rows) - len(fitting)


def _prompt_tokens(row: Row, tokenizer: Any) -> int:
    if isinstance(row.prompt, str):
        return len(tokenizer(row.prompt).input_ids)
    ids = tokenizer.apply_chat_template(row.prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    return len(ids["input_ids"])


def _pace(config: DLERConfig, rows: list[Row]) -> Dataset:
    """Rows for TRL's loader, as many as a step has: it decides when a step is due, `Stream` which prompts it gets."""
    prompts = [rows[i % len(rows)].prompt for i in range(config.prompts_per_step)]
    return Dataset.from_dict({"prompt": prompts})


def _arguments(config: DLERConfig, work: Path) -> GRPOConfig:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    per_update = config.prompts_per_update * config.group_size
    if per_update % (config.micro_batch * world):
        raise TrainError(
            f"an update has {per_update} answers, which {world} processes with micro_batch {config.micro_batch} "
            "cannot split evenly"
        )
    accumulation = per_update // (config.micro_batch * world)
    cpu = not torch.cuda.is_available()
    bf16 = config.precision == "bf16" or (config.precision == "auto" and not cpu)
    settings: dict[str, Any] = {
        "output_dir": str(work),
        "max_steps": config.steps * config.updates_per_step,
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "steps_per_generation": accumulation * config.updates_per_step,
        "num_generations": config.group_size,
        "max_completion_length": config.max_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "loss_type": "dapo",
        "epsilon": config.clip_low,
        "epsilon_high": config.clip_high,
        "delta": config.dual_clip,
        "beta": config.kl,
        "scale_rewards": "none",
        "mask_truncated_completions": False,
        "learning_rate": config.lr,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.gradient_clip,
        "bf16": bf16,
        "use_cpu": cpu,
        "gradient_checkpointing": config.recompute,
        "use_vllm": config.vllm != "none",
        "vllm_gpu_memory_utilization": config.vllm_memory,
        "vllm_tensor_parallel_size": config.vllm_tensor_parallel,
        # The published runs have no such correction; `trl` may set it.
        "vllm_importance_sampling_correction": False,
        "save_strategy": "steps",
        "save_steps": config.save_every * config.updates_per_step,
        "logging_steps": config.updates_per_step,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": config.seed,
        "shuffle_dataset": False,
    }
    if config.vllm != "none":
        settings |= {"vllm_mode": config.vllm, "vllm_server_base_url": config.vllm_server}
    try:
        return GRPOConfig(**(settings | config.trl))
    except (TypeError, ValueError) as error:
        raise TrainError(f"TRL does not take these settings: {error}") from error


def _check_output(config: DLERConfig, work: Path) -> None:
    if (config.output / "config.json").is_file() and not config.resume:
        raise TrainError(
            f"{config.output} holds a finished checkpoint: give another output, or --resume for more steps"
        )
    strange = [p.name for p in config.output.iterdir() if p != work] if config.output.is_dir() else []
    if strange and not work.is_dir():
        raise TrainError(f"{config.output} holds other files ({', '.join(sorted(strange)[:3])}): give a new folder")
    if config.resume and not checkpoints.found(work):
        raise TrainError(f"{work} has no checkpoint to resume: leave --resume out")
    work.mkdir(parents=True, exist_ok=True)
