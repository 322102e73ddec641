"""Runs of the DLER trainer on a model with random weights, in the environment that has TRL; prints what came of them.

`test_train_run.py` starts it once and looks at the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

SETTINGS: dict[str, Any] = {
    "chat": False,
    "judge": "train_child:parity",
    "think_end": None,
    "max_tokens": 24,
    "partial_credit": 0.1,
    "prompts_per_step": 4,
    "prompts_per_update": 2,
    "prompts_per_round": 3,
    "group_size": 4,
    "micro_batch": 8,
    "steps": 4,
    "save_every": 2,
    "keep": 3,
    "lr": 0.01,
    "kl": 0.1,
    "eval_rows": 6,
    "eval_max_tokens": 12,
    "eval_batch": 4,
}


def parity(text: str, answer: str, row: Mapping[str, Any]) -> float:
    """A judge that a random model pleases every other time."""
    return float(len(text.split(" ")[0]) % 2)


def main(folder: Path) -> dict[str, Any]:
    from vllm_dler.train import trl_import

    trl_import.prepare(vllm=False)
    import transformers
    import wordy_sums

    from vllm_dler.train.config import DLERConfig
    from vllm_dler.train.run import train

    torch.set_num_threads(1)
    model, rows = folder / "model", folder / "rows.jsonl"
    wordy_sums.make_tokenizer().save_pretrained(model)
    torch.manual_seed(0)
    shape = {**wordy_sums.SHAPE, "num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    ids = {"pad_token_id": wordy_sums.PAD_ID, "eos_token_id": wordy_sums.EOS_ID, "bos_token_id": None}
    config = transformers.LlamaConfig(**shape, **ids, vocab_size=len(wordy_sums.VOCABULARY))
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    wordy_sums.write_data(rows, wordy_sums.questions(40))

    def configured(name: str, **more: Any) -> DLERConfig:
        return DLERConfig(**{"model": str(model), "output": folder / name, "data": [rows], **SETTINGS, **more})

    return {
        "whole": train(configured("whole")),
        "resumed": _resumed(configured, train),
        "arithmetic": _arithmetic(configured),
        "refused": _refused(configured, train, folder),
        "shortened": _shortened(configured, train, folder),
    }


def _shortened(configured: Callable[..., Any], train: Callable[..., Any], folder: Path) -> dict[str, Any]:
    """A few steps on twenty questions that one layer can learn: what `test_train_shortens.py` has in earnest."""
    import wordy_sums

    wordy_sums.SHAPE |= {"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 96}
    rows = wordy_sums.questions(20, terms=2, largest=1, fillers=2.0)
    (folder / "short").mkdir()
    wordy_sums.train_wordy(folder / "short" / "wordy", wordy_sums.reworded(rows, 40, 2.0), steps=120)
    data = wordy_sums.write_data(folder / "short" / "rows.jsonl", rows)
    sizes = {"max_tokens": 12, "prompts_per_step": 16, "prompts_per_update": 8, "prompts_per_round": 16, "steps": 8}
    sizes |= {"group_size": 8, "micro_batch": 64, "eval_rows": 20, "eval_samples": 10, "eval_max_tokens": 80}
    recipe = {"judge": "boxed", "think_end": "</think>", "partial_credit": 0.0, "kl": 5e-4, "lr": 1e-3}
    measuring = {"eval_data": [data], "eval_temperature": 1.0, "eval_top_p": 1.0, "eval_batch": 200}
    model = {"model": str(folder / "short" / "wordy"), "data": [data], "save_every": 100}
    return train(configured("shortened", **model, **sizes, **recipe, **measuring))


def _resumed(configured: Callable[..., Any], train: Callable[..., Any]) -> dict[str, Any]:
    """Two steps, and two more after a restart: the same weights and log as four steps in one go."""
    train(configured("resumed", steps=2))
    report = train(configured("resumed", resume=True))
    lines, weights = [], []
    for name in ("whole", "resumed"):
        folder = configured(name).output
        entries = [json.loads(line) for line in (folder / "training" / "log.jsonl").read_text().splitlines()]
        lines.append([{k: v for k, v in e.items() if k != "seconds"} for e in entries if not e.get("measured")])
        weights.append((folder / "model.safetensors").read_bytes())
    start = (Path(configured("x").model) / "model.safetensors").read_bytes()
    return {
        "resumed_at": report["resumed_at"],
        "before": report["before"],
        "log": lines[0],
        "log_resumed": lines[1],
        "weights_equal": weights[0] == weights[1],
        "weights_moved": weights[0] != start,
        "left": sorted(p.name for p in (configured("resumed").output / "training").iterdir()),
    }


def _arithmetic(configured: Callable[..., Any]) -> dict[str, Any]:
    """What the trainer makes of one step's answers, beside `recipe` on the same numbers."""
    from vllm_dler.train import recipe, run
    from vllm_dler.train.grading import make_judge
    from vllm_dler.train.rows import read_rows
    from vllm_dler.train.trainer import DLERTrainer

    out: dict[str, Any] = {}
    kinds = {"batch": {}, "batch-tokens": {}, "group": {}, "tiers": {"tiers": [{"accuracy": 0.25, "max_tokens": 12}]}}
    for kind, more in kinds.items():
        settings = more if kind == "tiers" else {"advantage": kind}
        # No dual clip and far more probable tokens than before, so that every branch of the clip is taken.
        config = configured(f"arithmetic-{kind}", dual_clip=1.5, **settings)
        (config.output / "training").mkdir(parents=True)
        rows = read_rows(config.data, config)
        trainer = DLERTrainer(
            config,
            rows,
            make_judge(config.judge, None),
            model=run._model(config),
            args=run._arguments(config, config.output / "training"),
            train_dataset=run._pace(config, rows),
            processing_class=run._tokenizer(config),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        batch = trainer._generate_and_score_completions([{"prompt": ""}] * 16)
        texts = trainer._tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        lengths = batch["completion_mask"].sum(1)
        ended = (batch["completion_ids"] == 1).any(1)
        judged = torch.tensor([parity(text, "", {}) for text in texts], dtype=torch.float64)
        limits = recipe.tier_limits(judged * ended, 4, trainer._tiers, config.max_tokens)
        reward = recipe.truncation_reward(judged, ended & (lengths <= limits), partial_credit=0.1)
        expected = trainer.advantages(reward, lengths)
        out[kind] = {
            "advantages": batch["advantages"].tolist(),
            "expected": expected.tolist(),
            "reward": reward.tolist(),
            "informative": recipe.informative(reward, 4).tolist(),
            "lengths": lengths.tolist(),
            "chosen": vars(trainer.chosen),
        }
        if kind == "batch":
            out["loss"] = _loss(trainer, batch)
    return out


def _loss(trainer: Any, batch: dict[str, Any]) -> dict[str, float]:
    from vllm_dler.train import recipe

    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.3)
    mask = batch["completion_mask"]
    # TRL divides by the tokens of the generation, spread evenly over its updates; here one update has all of them.
    share = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    loss = trainer._compute_loss(trainer.model, batch) * share
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attended = torch.cat([batch["prompt_mask"], mask], 1)
    logits = trainer.model(ids, attention_mask=attended).logits[:, -mask.shape[1] - 1 : -1]
    now = logits.log_softmax(-1).gather(2, batch["completion_ids"][:, :, None])[:, :, 0]
    settings = {"low": 0.2, "high": 0.28, "dual": 1.5}
    policy = recipe.clipped_loss(now, batch["old_per_token_logps"], batch["advantages"], mask, **settings)
    kl = (recipe.squared_kl(now, batch["ref_per_token_logps"]) * mask).sum() / mask.sum()
    ratio = (now - batch["old_per_token_logps"]).exp()[mask.bool()]
    return {
        "loss": loss.item(),
        "expected": (policy + 0.1 * kl).item(),
        "kl": kl.item(),
        "logged_kl": trainer._metrics["train"]["kl"][-1],
        "low": ratio.min().item(),
        "high": ratio.max().item(),
    }


def _refused(configured: Callable[..., Any], train: Callable[..., Any], folder: Path) -> dict[str, str]:
    from vllm_dler.train.grading import TrainError

    def told(**more: Any) -> str:
        try:
            train(configured("resumed", **more))
        except TrainError as error:
            return str(error).replace(str(folder), "")
        return ""

    finished = told()
    (configured("resumed").output / "config.json").unlink()
    out = {"finished": finished, "no_resume": told(), "settings": told(resume=True, clip_high=0.5)}
    newest = configured("resumed").output / "training" / "checkpoint-8"
    weights = newest / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    out["cut_file"] = told(resume=True, steps=6)
    weights.unlink()
    out["lost_file"] = told(resume=True, steps=6)
    out["trl"] = told(trl={"no_such": 1}, output=folder / "trl")
    return out


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "result.json").write_text(json.dumps(main(target)))
