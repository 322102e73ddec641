"""Answers of engines beside those of the plain reference, and what the tail computed beside what was sampled."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path

import reference_swiftkv
import torch
from swiftkv_child import Answer, Ask, Report

# float32 on both sides: sums in another order, and RoPE's angles, which float32 rounds to 3e-5 at position 400. The
# reference in float64 differs from itself in float32 by as much as engines do, up to 9e-5 on one machine.
# What is wrong is off by hundreds of times the tolerance.
TOLERANCE = 3e-4


def tokens(count: int, seed: int = 0) -> tuple[int, ...]:
    """A reproducible prompt of the tiny models' ordinary tokens."""
    rng = random.Random(f"{count}:{seed}")
    return tuple(rng.randrange(16, 500) for _ in range(count))


@functools.lru_cache(maxsize=8)
def reference(model: Path) -> reference_swiftkv.Reference:
    return reference_swiftkv.load(model)


def compare(
    model: Path | reference_swiftkv.Reference, asks: Sequence[Ask], report: Report, tolerance: float = TOLERANCE
) -> None:
    """Every answer is the reference's greedy continuation, its log-probabilities within ``tolerance``."""
    plain = reference(model) if isinstance(model, Path) else model
    for ask, answer in zip(asks, report.answers, strict=True):
        matches(plain, ask, answer, tolerance)


def matches(plain: reference_swiftkv.Reference, ask: Ask, answer: Answer, tolerance: float = TOLERANCE) -> None:
    """One answer, position by position: the engine's own tokens are fed, so the first difference is reported."""
    assert len(answer.tokens) == ask.max_tokens
    length = len(ask.prompt)
    rows = logprobs(plain, (*ask.prompt, *answer.tokens[:-1]))
    for i, (token, given) in enumerate(zip(answer.tokens, answer.logprobs, strict=True)):
        row = rows[length - 1 + i]
        where = f"prompt of {length}, token {i}"
        best = int(row.argmax())
        behind = (row[best] - row[token]).item()
        # Two tokens as likely as each other within the tolerance may be told apart either way.
        said = f"{where}: engine {token} ({given[token]:.4f}), reference {best}, {behind:.1e} likelier"
        assert token == best or behind <= tolerance, said
        close(row, given, tolerance, where)
    if ask.prompt_logprobs is not None:
        assert answer.prompt_logprobs is not None
        assert answer.prompt_logprobs[0] is None
        for i, known in enumerate(answer.prompt_logprobs[1:], 1):
            assert known is not None
            assert ask.prompt[i] in known
            assert len(known) >= ask.prompt_logprobs
            close(rows[i - 1], known, tolerance, f"prompt of {length}, prompt token {i}")


def close(row: torch.Tensor, given: dict[int, float], tolerance: float, where: str) -> None:
    for token, value in given.items():
        assert abs(row[token].item() - value) <= tolerance, f"{where}: {token} engine {value}, reference {row[token]}"


def logprobs(plain: reference_swiftkv.Reference, ids: tuple[int, ...]) -> torch.Tensor:
    return plain.logits(list(ids)).log_softmax(-1)


def skipped_exactly(report: Report, eager: bool = True) -> None:
    """Armed: the tail computed the rows that were sampled, no more, no less; the others are NaN and went nowhere."""
    counted = report.counted
    assert counted["steps"] == len(report.steps)
    assert counted["head_tokens"] == report.scheduled
    assert counted["tail_rows"] == report.sampled
    assert counted["prompt_tokens"] == report.prompt_tokens
    if eager:  # no graph, no padding
        assert report.tail_rows == [sum(1 + d for _, d in step.values()) for step in report.steps]
    assert report.skipped_rows == report.scheduled - report.sampled
    assert not report.sampled_nan


def skipped_nothing(report: Report) -> None:
    """Not armed: the tail computed every row."""
    assert report.counted == {"steps": 0, "head_tokens": 0, "prompt_tokens": 0, "tail_rows": 0}
    assert report.tail_rows == [sum(t for t, _ in step.values()) for step in report.steps]
    assert report.skipped_rows == 0
    assert not report.sampled_nan
