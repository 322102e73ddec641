"""DLER on TRL's GRPOTrainer.

TRL keeps what it does as the recipe wants it: sampling with transformers or vLLM, log-probabilities, the clipped loss
over tokens, distribution. Four things differ and are put in place around its own methods: which answers a step trains
on, what they earn, their advantages, and the estimate of the KL divergence. The names used are those of TRL 1.16.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from vllm_dler.train import checkpoints, recipe, rollouts
from vllm_dler.train.config import DLERConfig
from vllm_dler.train.grading import Judge, TrainError
from vllm_dler.train.rows import Row, Stream

# What `GRPOTrainer._generate` returns, in order.
_PROMPT_IDS, _COMPLETION_IDS, _FIELDS = 0, 1, 8
# Of those, one entry per answer.
_PER_ANSWER = (0, 1, 3, 4)


class DLERTrainer(GRPOTrainer):
    """Trains on answers that `rollouts.choose` picked, with `recipe`'s rewards and advantages.

    Args:
        config: the run.
        rows: what to train on.
        judge: see `grading.make_judge`.
        kwargs: of GRPOTrainer. Its ``train_dataset`` only gives the pace; prompts come from ``rows``.
    """

    # GRPOTrainer's own, which are changed for a while here.
    beta: float
    generation_config: Any
    generation_kwargs: dict[str, Any]

    def __init__(self, config: DLERConfig, rows: list[Row], judge: Judge, **kwargs: Any) -> None:
        super().__init__(reward_funcs=[earned], **kwargs)
        self.config, self.rows, self.judge = config, rows, judge
        self.stream = Stream(len(rows), config.seed)
        self.fingerprint: dict[str, Any] = {}
        self.chosen = rollouts.Chosen()
        self._tiers = [recipe.Tier(tier.accuracy, tier.max_tokens) for tier in config.tiers]
        # The answers that a step trains on and their rewards, while TRL prepares that step.
        self._picked: tuple[Any, ...] | None = None
        self._picked_reward: Tensor | None = None
        self._partial: Path | None = None
        self._step_logprobs: Tensor | None = None
        if config.round_prompts * config.group_size % self.accelerator.num_processes:
            raise TrainError(
                f"{config.round_prompts} prompts of {config.group_size} answers each cannot be spread over "
                f"{self.accelerator.num_processes} processes: change prompts_per_round"
            )

    # ------------------------------------------------------------------ which answers, and what they earn

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL calls it once per step with this process's share of the step's rows."""
        if not self.model.training:
            raise RuntimeError("measure with `measure`: TRL's own evaluation samples as training does")
        config, group = self.config, self.config.group_size
        rounds = _Rounds(self)
        self.chosen = chosen = rollouts.choose(
            rounds.sample,
            group,
            config.prompts_per_step,
            dynamic=config.dynamic_sampling,
            max_rounds=config.max_rounds,
            stop_short=config.on_shortfall == "stop",
        )
        answers = [first + i for first in (g * group for g in chosen.groups) for i in range(group)]
        reward, lengths = rounds.reward()[answers], rounds.lengths()[answers]
        advantages = self.advantages(reward, lengths)
        here = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        rows, self._picked = rounds.pick(answers, here)
        self._picked_reward = reward[:, None].to(self.accelerator.device, torch.float32)
        try:
            output = super()._generate_and_score_completions([{"prompt": row.prompt} for row in rows])
        finally:
            self._picked = self._picked_reward = None
        output["advantages"] = advantages[here].to(self.accelerator.device, torch.float32)
        self._log_step(chosen, rounds)
        return output

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        if self._picked is not None:
            return self._picked
        out = super()._generate(prompts)
        if len(out) != _FIELDS:
            raise RuntimeError(f"GRPOTrainer._generate returns {len(out)} fields, not {_FIELDS}: TRL 1.16 is needed")
        return out

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        assert self._picked_reward is not None
        return self._picked_reward

    def advantages(self, reward: Tensor, lengths: Tensor) -> Tensor:
        """[N] advantages of a whole step's answers, as the configuration says."""
        group = self.config.group_size
        if self.config.advantage == "group":
            return recipe.group_advantages(reward, group)
        return recipe.batch_advantages(reward, group, lengths if self.config.advantage == "batch-tokens" else None)

    def ended(self, completion_ids: list[list[int]]) -> list[bool]:
        """Whether each answer came to its end before it was cut."""
        ends = set(self.eos_token_ids)
        return [bool(ids) and ids[-1] in ends for ids in completion_ids]

    def judged(self, rows: list[Row], completion_ids: list[list[int]]) -> list[float]:
        """What the judge gives each answer, cut or not."""
        texts = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [float(self.judge(text, row.answer, row.fields)) for text, row in zip(texts, rows, strict=True)]

    def _log_step(self, chosen: rollouts.Chosen, rounds: _Rounds) -> None:
        put = self._metrics["train"]
        put["rounds"].append(chosen.rounds)
        put["groups/sampled"].append(chosen.sampled)
        put["groups/kept"].append(chosen.informative / chosen.sampled)
        put["groups/all_right"].append(chosen.all_right / chosen.sampled)
        put["groups/all_wrong"].append(chosen.all_wrong / chosen.sampled)
        put["groups/filled"].append(chosen.filled)
        put["groups/surplus"].append(chosen.surplus)
        ended = rounds.column(1)
        put["answers/right"].append((rounds.column(0) > 0).double().mean().item())
        put["answers/right_in_time"].append(((rounds.column(0) > 0) & (ended > 0)).double().mean().item())
        put["answers/cut"].append(1 - ended.mean().item())
        put["answers/length"].append(rounds.lengths().double().mean().item())

    # ------------------------------------------------------------------ the KL divergence

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; where the configuration says mse, with that estimate of the divergence in place of TRL's."""
        if self.beta == 0.0 or self.config.kl_estimator == "k3":
            return super()._compute_loss(model, inputs)
        beta, self.beta = self.beta, 0.0
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        logprobs, self._step_logprobs = self._step_logprobs, None
        assert logprobs is not None
        mask = inputs["completion_mask"]
        kl = (recipe.squared_kl(logprobs, inputs["ref_per_token_logps"]) * mask).sum()
        # The same share of the step's tokens as in TRL's own loss.
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        totals = self.accelerator.reduce(torch.stack([kl.detach(), mask.sum().to(kl.dtype)]), "sum")
        self._metrics["train"]["kl"].append((totals[0] / totals[1]).item())
        return loss + beta * kl / tokens

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if torch.is_grad_enabled():
            self._step_logprobs = out[0]
        return out

    # ------------------------------------------------------------------ measuring

    def measure(self, rows: list[Row]) -> dict[str, float]:
        """Accuracy and length of answers to held-out ``rows``, with ``eval_*`` settings and random numbers of its own.

        Every process calls it. An answer counts as right where the judge says so, ended or not.
        """
        config, accelerator = self.config, self.accelerator
        asked = [row for row in rows for _ in range(config.eval_samples)]
        size = config.eval_batch
        sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
        training = self.model.training
        self.model.eval()
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=devices), self._measuring():
            torch.manual_seed(config.seed * 1_000_003 + 1 + accelerator.process_index)
            # Every process makes as many passes: one without answers of its own repeats the first, uncounted.
            for start in range(0, len(asked), size * accelerator.num_processes):
                first = start + accelerator.process_index * size
                batch = asked[first : first + size]
                counted = bool(batch)
                batch = batch or asked[:1]
                prompt_ids, images, extra = self._tokenize_prompts([row.prompt for row in batch])
                ids, _ = self._generate_single_turn(prompt_ids, images, extra, 1)
                if counted:
                    right = sum(score > 0 for score in self.judged(batch, ids))
                    values = [len(batch), right, sum(map(len, ids)), sum(not e for e in self.ended(ids))]
                    sums += torch.tensor(values, dtype=torch.float64, device=accelerator.device)
        self.model.train(training)
        number, right, tokens, cut = accelerator.reduce(sums, "sum").tolist()
        return {"answers": number, "accuracy": right / number, "length": tokens / number, "cut": cut / number}

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Sampling settings of a measurement in place of training's."""
        config = self.config
        wanted = {
            "temperature": config.eval_temperature,
            "top_p": config.eval_top_p,
            "max_completion_length": config.longest_measured,
        }
        if self.use_vllm:
            before = {name: getattr(self.vllm_generation, name) for name in wanted}
            for name, value in wanted.items():
                setattr(self.vllm_generation, name, value)
            try:
                yield
            finally:
                for name, value in before.items():
                    setattr(self.vllm_generation, name, value)
            return
        changes: dict[str, Any] = {"max_new_tokens": config.longest_measured, "do_sample": config.eval_temperature > 0}
        if config.eval_temperature > 0:
            changes |= {"temperature": config.eval_temperature, "top_p": config.eval_top_p}
        else:
            changes |= {"temperature": 1.0, "top_p": 1.0}
        config_before, kwargs_before = self.generation_config, self.generation_kwargs
        self.generation_kwargs = {**kwargs_before, **changes}
        self.generation_config = type(config_before)(**self.generation_kwargs, disable_compile=True)
        try:
            yield
        finally:
            self.generation_config, self.generation_kwargs = config_before, kwargs_before

    # ------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's checkpoint, written elsewhere and moved to its place when it is whole."""
        folder = Path(self.args.output_dir)
        self._partial = folder / ".partial"
        if self.accelerator.is_main_process:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        partial = self._partial / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = {
                "step": self.state.global_step // self.config.updates_per_step,
                "position": self.stream.position,
                "fingerprint": self.fingerprint,
            }
            checkpoints.seal(partial, folder, state, self.config.keep)
            shutil.rmtree(folder / ".partial", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: what a run made is described by its log and report."""


def earned(**_: Any) -> list[float]:
    """Stands for the reward among TRL's reward functions; `DLERTrainer._calculate_rewards` gives its values."""
    raise RuntimeError("rewards are given by DLERTrainer")


class _Rounds:
    """The rounds of one step: this process's answers, and every process's rewards."""

    def __init__(self, trainer: DLERTrainer) -> None:
        self._trainer = trainer
        self._rows: dict[int, Row] = {}
        self._answers: dict[int, tuple[Any, ...]] = {}  # by number over all rounds and processes; this process's
        self._tables: list[Tensor] = []  # [answers of a round, 4]: judged, ended, length, reward

    def sample(self) -> Tensor:
        """One more round. Returns its rewards, of all processes."""
        trainer, config = self._trainer, self._trainer.config
        accelerator, group = trainer.accelerator, config.group_size
        rows = [trainer.rows[i] for i in trainer.stream.take(config.round_prompts) for _ in range(group)]
        share = len(rows) // accelerator.num_processes
        first = accelerator.process_index * share
        mine = rows[first : first + share]
        out = trainer._generate([row.prompt for row in mine])
        ids = out[_COMPLETION_IDS]
        local = torch.tensor(
            [trainer.judged(mine, ids), trainer.ended(ids), [len(i) for i in ids]],
            dtype=torch.float64,
            device=accelerator.device,
        )
        judged, ended, length = accelerator.gather(local.T.contiguous()).T.cpu()
        reward = recipe.truncation_reward(judged, ended > 0, partial_credit=config.partial_credit)
        if trainer._tiers:
            limit = recipe.tier_limits(judged * ended, group, trainer._tiers, config.max_tokens)
            in_time = (ended > 0) & (length <= limit)
            reward = recipe.truncation_reward(judged, in_time, partial_credit=config.partial_credit)
        offset = sum(map(len, self._tables))
        self._tables.append(torch.stack([judged, ended, length, reward], 1))
        for i in range(share):
            number = offset + first + i
            self._rows[number] = mine[i]
            self._answers[number] = tuple(
                out[f][i] if f in _PER_ANSWER and out[f] is not None else None for f in range(_FIELDS)
            )
        return reward

    def column(self, index: int) -> Tensor:
        """0 judged, 1 ended, 2 length, 3 reward: [answers], over all rounds and processes."""
        return torch.cat([table[:, index] for table in self._tables])

    def reward(self) -> Tensor:
        """[answers] what each earned."""
        return self.column(3)

    def lengths(self) -> Tensor:
        """[answers] tokens of each."""
        return self.column(2)

    def pick(self, answers: list[int], here: slice) -> tuple[list[Row], tuple[Any, ...]]:
        """This process's part of the chosen answers, as rows and as what `GRPOTrainer._generate` returns."""
        wanted = set(answers)
        held = [(n, self._rows[n], answer) for n, answer in self._answers.items() if n in wanted]
        if self._trainer.accelerator.num_processes > 1:
            held = gather_object(held)
        by_number = {n: (row, answer) for n, row, answer in held}
        mine = [by_number[n] for n in answers[here]]
        fields: list[Any] = [None] * _FIELDS
        for f in _PER_ANSWER:
            if mine[0][1][f] is not None:
                fields[f] = [answer[f] for _, answer in mine]
        fields[5], fields[7] = {}, []  # extra fields and images of tools
        return [row for row, _ in mine], tuple(fields)
