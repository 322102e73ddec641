"""A tiny ordinary model trained on real text until it predicts it, and the text: what a distillation is tried on.

The text is the docstrings of Python's own standard library, English prose and code that every machine has.
"""

from __future__ import annotations

import ast
import gc
import json
import math
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from vllm_suite.fleet.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, write_tokenizer

# Deep and narrow, so that what late layers attend to matters: a cut in the middle costs something to win back.
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "initializer_range": 0.05,
}
CHANCE = math.log(VOCAB_SIZE)  # loss of a model that knows nothing, nats per token


def docstrings() -> list[str]:
    """Docstrings of a hundred characters and more of the standard library's modules, in the order of their files."""
    found: list[str] = []
    folder = Path(sysconfig.get_path("stdlib"))
    # What earlier tests left behind may be reported when it is collected, and a report of Python 3.11 parses source.
    # Inside `ast.parse` that is a SystemError.
    gc.collect()
    for file in sorted([*folder.glob("*.py"), *folder.glob("[a-z]*/*.py")]):
        if {"site-packages", "test", "idlelib", "lib2to3"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= 100:
                    found.append(text)
    return list(dict.fromkeys(found))


def write_text(path: Path, texts: list[str]) -> Path:
    """Texts as JSONL."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def train_teacher(path: Path, texts: list[str], *, steps: int, rows: int = 8, seed: int = 0, **shape: Any) -> Path:
    """Train a Llama on ``texts``, ``rows`` of 128 tokens a step, and write it, with its tokenizer, into ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    write_tokenizer(path, model_max_length=2048)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    stream = torch.tensor([t for ids in tokenizer(texts).input_ids for t in (BOS_ID, *ids)])
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **(SHAPE | shape),
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    for step, ids in enumerate(_batches(stream, steps, rows=rows, length=128)):
        rate = 3e-3 * min((step + 1) / 20, (steps - step) / (0.7 * steps), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        logits = model(ids[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    return path


def _batches(stream: torch.Tensor, steps: int, rows: int, length: int) -> Iterator[torch.Tensor]:
    for _ in range(steps):
        starts = torch.randint(len(stream) - length - 1, (rows,))
        yield torch.stack([stream[s : s + length + 1] for s in starts])
