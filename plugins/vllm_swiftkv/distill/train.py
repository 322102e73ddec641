"""The distillation loop, on one CPU or under ``accelerate launch`` on many GPUs."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from vllm_swiftkv.distill import prepare, rows, state
from vllm_swiftkv.distill.config import DistillConfig
from vllm_swiftkv.distill.progress import Progress
from vllm_swiftkv.distill.student import Student
from vllm_swiftkv.families import SwiftKVError
from vllm_swiftkv.hf import checkpoint

WORK = "training"  # folder within the output for data, checkpoints and the log


def distill(config: DistillConfig) -> dict[str, Any]:
    """Train, write the checkpoint to ``config.output`` and return the report.

    Raises SwiftKVError for anything wrong with settings, checkpoint or data, before a step is taken where it can be
    known by then. What a stopped run has saved, the same call with ``resume=True`` goes on from.
    """
    cut = prepare.cut(config)  # what can be wrong at once is said before the data is read
    accelerator = prepare.accelerator(config)
    work = config.output / WORK
    if accelerator.is_main_process:
        prepare.check_output(config, work)
    accelerator.wait_for_everyone()
    data = prepare.data(config, accelerator, work)
    if config.prepare_only:
        return {"prepared": str(work), "documents": len(data.train), "rows": len(data.train_rows)}
    return _Run(config, accelerator, data, work, prepare.model(config, accelerator, cut)).run()


class _Run:
    def __init__(
        self, config: DistillConfig, accelerator: Accelerator, data: prepare.Data, work: Path, model: Any
    ) -> None:
        self.config, self.accelerator, self.data, self.work = config, accelerator, data, work
        per_step = accelerator.num_processes * config.micro_batch * config.accumulation
        self.schedule = rows.Schedule(data.train_rows, per_step, config.seed)
        self.steps = config.max_steps or self.schedule.steps(config.epochs)
        self.warmup = int(config.warmup * self.steps)
        self.split = model.split
        student = Student(model, config.temperature, config.loss_memory_mib)
        student.train()
        trained = [p for p in student.parameters() if p.requires_grad]
        self.counts = {"trained": sum(map(torch.numel, trained)), "all": sum(map(torch.numel, student.parameters()))}
        adamw = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self.student, prepared = accelerator.prepare(student, adamw)
        self.optimizer = prepared
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        # A run goes on as what it was: same data, same settings, same number of rows per step.
        self.fingerprint = config.fingerprint() | {
            "data": data.train.digest,
            "held_out": data.held.digest,
            "rows_per_step": per_step,
        }

    def run(self) -> dict[str, Any]:
        first, before = self._start()
        began, tokens = time.monotonic(), 0
        progress = Progress(self.steps, first, self.accelerator.is_main_process)
        with progress, self._log(first) as log:
            progress.say(_line("before", before))
            for step in range(first, self.steps):
                entry = self._step(step)
                tokens += entry["tokens"]
                last = step + 1 == self.steps
                if last or (step + 1) % self.config.log_every == 0:
                    entry = self._finish(entry)
                    if log is not None:
                        log.write(json.dumps(entry) + "\n")
                        log.flush()
                    progress.step(entry)
                if last or (step + 1) % self.config.save_every == 0:
                    self._save(step + 1, before)
            seconds = time.monotonic() - began
            after = self._measure()
            progress.say(_line("after", after))
        self._write()
        gap = before["student"] - before["teacher"]
        return {
            "model": str(self.config.model),
            "output": str(self.config.output),
            "num_key_value_layers": self.split.cut,
            "key_value_group_size": self.split.group,
            "before": before,
            "after": after,
            # Undefined where the cut cost nothing.
            "gap_closed": (before["student"] - after["student"]) / gap if gap > 0 else None,
            "steps": self.steps,
            "resumed_at": first or None,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds if seconds > 0 and tokens else None,
            "processes": self.accelerator.num_processes,
            "parameters": self.counts,
            "documents": {"trained_on": len(self.data.train), "dropped": self.data.train.dropped},
            "cut_off": self.data.train.cut_off,
            "settings": self.fingerprint,
        }

    def _start(self) -> tuple[int, dict[str, float]]:
        """The first step to take, and how the untrained student does."""
        found = state.checkpoints(self.work)
        if not found:
            return 0, self._measure()
        if not self.config.resume:
            raise SwiftKVError(f"{self.work} has checkpoints of a run before: add --resume, or give another output")
        read = state.read_state(found[-1], self.fingerprint)
        state.load_state(found[-1], self.student, self.optimizer.optimizer)
        return int(read["step"]), read["before"]

    def _step(self, step: int) -> dict[str, Any]:
        """One update. Its loss is over all rows of the step at once, however they are spread over processes."""
        config, accelerator, train = self.config, self.accelerator, self.data.train
        began = time.monotonic()
        all_rows = self.schedule.at(step)
        tokens = sum(rows.tokens_of(train, row) for row in all_rows)
        mine = all_rows[accelerator.process_index :: accelerator.num_processes]
        passes = [mine[i : i + config.micro_batch] for i in range(0, len(mine), config.micro_batch)]
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        kl = mse = torch.zeros((), device=accelerator.device)
        for i, chosen in enumerate(passes):
            batch = rows.collate(train, chosen).to(accelerator.device)
            last = i + 1 == len(passes)
            with contextlib.nullcontext() if last else accelerator.no_sync(self.student):
                sums = self.student(batch)
                # Gradients are averaged over processes; the loss is a sum over them.
                scale = accelerator.num_processes / tokens
                accelerator.backward((sums["kl"] + config.hidden_weight * sums["mse"]) * scale)
            kl, mse = kl + sums["kl"].detach(), mse + sums["mse"].detach()
        norm = accelerator.clip_grad_norm_(self.trained, config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"step": step + 1, "lr": rate, "kl": kl, "mse": mse, "norm": norm, "tokens": tokens, "began": began}

    def _finish(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The step's figures over all processes, per token."""
        sums = self.accelerator.reduce(torch.stack([entry["kl"], entry["mse"]]).float(), "sum")
        kl, mse = (sums / entry["tokens"]).tolist()
        norm = entry["norm"].full_tensor() if hasattr(entry["norm"], "full_tensor") else entry["norm"]
        loss = kl + self.config.hidden_weight * mse
        if not math.isfinite(loss):
            raise SwiftKVError(f"the loss of step {entry['step']} is {loss}: lower the rate, or train in fp32")
        return {
            "step": entry["step"],
            "loss": loss,
            "kl": kl,
            "mse": mse,
            "lr": entry["lr"],
            "gradient_norm": float(norm),
            "tokens": entry["tokens"],
            "seconds": round(time.monotonic() - entry["began"], 4),
        }

    def _rate(self, step: int) -> float:
        """Linear to the peak over the warm-up, then linear to zero, as transformers' ``linear`` (ArcticTraining's)."""
        if step < self.warmup:
            return self.config.lr * (step + 1) / self.warmup
        return self.config.lr * (self.steps - step) / (self.steps - self.warmup)

    def _measure(self) -> dict[str, float]:
        """Held-out figures per token: cross-entropies of student and teacher, and the two losses."""
        accelerator, held = self.accelerator, self.data.held
        chosen = self.data.held_rows[: self.config.eval_rows]
        names = ("student", "teacher", "kl", "mse")
        sums = torch.zeros(len(names) + 2, device=accelerator.device, dtype=torch.float64)
        # Every process makes as many passes as the others: one without a row of its own repeats the first, uncounted.
        for start in range(0, len(chosen), accelerator.num_processes):
            index = start + accelerator.process_index
            counted = index < len(chosen)
            batch = rows.collate(held, [chosen[index if counted else 0]]).to(accelerator.device)
            with torch.no_grad():
                out = self.student(batch, measure=True)
            if counted:
                sums += torch.stack([*(out[n].double() for n in names), batch.learn.sum(), batch.real.sum()])
        *totals, learned, real = accelerator.reduce(sums, "sum").tolist()
        return {n: total / (real if n == "mse" else learned) for n, total in zip(names, totals, strict=True)} | {
            "tokens": int(learned)
        }

    def _save(self, step: int, before: dict[str, float]) -> None:
        kept = {"step": step, "before": before, "fingerprint": self.fingerprint}
        main = self.accelerator.is_main_process
        state.save_state(self.work, self.student, self.optimizer.optimizer, kept, main=main, keep=self.config.keep)
        self.accelerator.wait_for_everyone()

    def _write(self) -> None:
        """The result, by the first process."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(self.student, options=options)
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.student).model
            named = {name.removeprefix("model."): tensor for name, tensor in full.items()}
            if model.config.tie_word_embeddings:
                named.pop("lm_head.weight", None)
            checkpoint.save(model, self.config.output, source=self.config.model, state=named)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _log(self, first: int) -> Any:
        """The log, one JSON object per line, without lines of steps that are taken again."""
        if not self.accelerator.is_main_process:
            yield None
            return
        file = self.work / "log.jsonl"
        lines = file.read_text().splitlines() if file.is_file() and first else []
        kept = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line of a killed run may be half a line
                if json.loads(line)["step"] <= first:
                    kept.append(line)
        file.write_text("".join(line + "\n" for line in kept))
        with file.open("a") as log:
            yield log


def _line(when: str, measured: dict[str, float]) -> str:
    return f"{when}: held-out loss {measured['student']:.4f}, the teacher's {measured['teacher']:.4f}"
