r"""A tiny model that answers verifiable questions wordily, and what it learned them from: what DLER is tried on.

The question is a chain of digits to add modulo 10. The answer works it out sum by sum, which a model this small needs,
with filler sentences in between, which nobody needs; then `</think>` and the result in `\boxed{}`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

FILLERS = (
    "wait , let me check that step again .",
    "hmm , this looks right so far .",
    "okay , so we go on from here .",
    "alternatively we could add them in another order .",
)
_WORDS = ["<pad>", "</s>", "</think>", "\\boxed{", "}", "+", "=", "mod", "?", ";", *map(str, range(10))]
VOCABULARY = [*_WORDS, *dict.fromkeys(word for filler in FILLERS for word in filler.split())]
PAD_ID, EOS_ID = 0, 1
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "initializer_range": 0.05,
}
MAX_TOKENS = 26  # truncation length; an answer without a filler has 17 tokens, with one 25 or 26
Question = tuple[str, str, str]  # prompt, wordy answer, result


def questions(number: int, *, terms: int = 3, largest: int = 4, fillers: float = 1.5, seed: int = 0) -> list[Question]:
    """Different questions, each with a wordy answer: ``fillers`` sentences after each sum on average.

    Any digit comes first, ``largest`` is the largest of those that are added to it.
    """
    random_ = random.Random(seed)
    made: dict[str, Question] = {}
    while len(made) < number:
        digits = [random_.randrange(10), *(random_.randint(0, largest) for _ in range(terms - 1))]
        prompt = " + ".join(map(str, digits)) + " ?"
        if prompt not in made:
            made[prompt] = (prompt, wordy(digits, fillers, random_), str(sum(digits) % 10))
    return list(made.values())


def wordy(digits: Sequence[int], fillers: float, random_: random.Random) -> str:
    """The worked answer. The number of sentences after each sum is geometric: many are few, few are many."""
    words, total = [], digits[0]
    for digit in digits[1:]:
        words.append(f"{total} + {digit} = {(total + digit) % 10} ;")
        total = (total + digit) % 10
        while random_.random() < fillers / (1 + fillers):
            words.append(random_.choice(FILLERS))
    return " ".join([*words, f"</think> \\boxed{{ {total} }}"])


def write_data(path: Path, rows: Sequence[Question]) -> Path:
    """Prompts and results as JSONL, without the answers."""
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": result}) + "\n" for prompt, _, result in rows))
    return path


def make_tokenizer() -> Any:
    """One token per word; text is joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="?"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")  # noqa: S106


def train_wordy(path: Path, rows: Sequence[Question], *, steps: int, batch: int = 32, seed: int = 0) -> float:
    """Supervised steps on the wordy answers; writes model and tokenizer into ``path``. Returns the last loss."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(path)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = transformers.LlamaForCausalLM(config)
    texts = [(tokenizer(p).input_ids, [*tokenizer(a).input_ids, EOS_ID]) for p, a, _ in rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / 20, (steps - step) / (0.5 * steps), 1.0)
        chosen = [texts[i] for i in torch.randint(len(texts), (batch,)).tolist()]
        ids, labels = _collate(chosen)
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return float(loss.detach())


def reworded(rows: Sequence[Question], times: int, fillers: float = 1.5) -> list[Question]:
    """Each question ``times`` times, with other filler sentences every time."""
    out = []
    for turn in range(times):
        random_ = random.Random(turn)
        for prompt, _, result in rows:
            digits = [int(word) for word in prompt.split() if word.isdigit()]
            out.append((prompt, wordy(digits, fillers, random_), result))
    return out


def prepare(folder: Path, *, steps: int, rows: int = 250, held: int = 50) -> dict[str, Any]:
    """The wordy model and its data in ``folder``, for `dler_settings`. Returns what it learned from.

    There are 250 questions of three digits; ``held`` of them are never learned from.
    """
    made = questions(rows)
    loss = train_wordy(folder / "wordy", reworded(made[held:], 16), steps=steps)
    write_data(folder / "train.jsonl", made[held:])
    write_data(folder / "held.jsonl", made[:held])
    return {"steps": steps, "loss": loss, "questions": rows - held, "held_out": held}


def dler_settings(folder: Path) -> dict[str, Any]:
    """Settings of `vllm-suite dler train` that shorten the wordy model: the recipe, at the size of this task."""
    return {
        "model": str(folder / "wordy"),
        "data": [str(folder / "train.jsonl")],
        "eval_data": [str(folder / "held.jsonl")],
        "chat": False,
        "max_tokens": MAX_TOKENS,
        "prompts_per_step": 16,
        "prompts_per_update": 8,
        "prompts_per_round": 16,
        "group_size": 8,
        "micro_batch": 64,
        "steps": 20,
        "lr": 4e-4,
        "save_every": 10,
        "eval_every": 4,
        "eval_rows": 50,
        "eval_samples": 10,
        "eval_max_tokens": 5 * MAX_TOKENS,
        "eval_temperature": 1.0,
        "eval_top_p": 1.0,
        "eval_batch": 500,
    }


def _collate(chosen: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    # Padding on the right needs no mask: what is padded is never learned, and nothing real attends to it.
    longest = max(len(prompt) + len(answer) for prompt, answer in chosen)
    ids = torch.full((len(chosen), longest), PAD_ID)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(chosen):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels
