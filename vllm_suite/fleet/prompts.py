"""Prompts for a trace: token ids that follow its lengths and shared prefixes, scaled to a model's window."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from vllm_suite.fleet.traces import MOONCAKE_BLOCK_TOKENS, Trace, TraceRequest


@dataclass(frozen=True)
class Prompt:
    """One request to send: when (seconds after the start) and what."""

    index: int
    arrival_s: float
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Scale:
    """How a trace is made to fit: lengths times `length`, then cut at `max_tokens`; arrival times times `time`."""

    length: float
    time: float
    max_tokens: int


def fit(trace: Trace, max_prompt_tokens: int, duration_s: float) -> Scale:
    """Scale so that nine prompts in ten fit uncut and all arrive within `duration_s`; never stretches either."""
    lengths = sorted(request.input_tokens for request in trace.requests)
    p90 = lengths[min(len(lengths) - 1, int(0.9 * len(lengths)))]
    span = trace.requests[-1].arrival_s
    return Scale(
        length=min(1.0, max_prompt_tokens / p90),
        time=min(1.0, duration_s / span) if span > 0 else 1.0,
        max_tokens=max_prompt_tokens,
    )


def build_prompts(trace: Trace, scale: Scale, token_ids: range, seed: int = 0) -> list[Prompt]:
    """Draw the prompts from `token_ids`; equal arguments give equal prompts.

    Blocks with the same id have the same content in every prompt; what an id does not cover is drawn anew.
    """
    return [
        Prompt(index, request.arrival_s * scale.time, _tokens(request, index, scale, token_ids, seed))
        for index, request in enumerate(trace.requests)
    ]


def _tokens(request: TraceRequest, index: int, scale: Scale, ids: range, seed: int) -> tuple[int, ...]:
    length = max(2, min(scale.max_tokens, round(request.input_tokens * scale.length)))
    # A shared block shrinks with the prompt, or short prompts would be all prefix.
    block = max(1, round(MOONCAKE_BLOCK_TOKENS * scale.length))
    tokens: list[int] = []
    for block_id in request.prefix_ids:
        if len(tokens) >= length:
            break
        tokens += _draw(f"{seed}:block:{block_id}", block, ids)
    if len(tokens) < length:
        tokens += _draw(f"{seed}:request:{index}", length - len(tokens), ids)
    return tuple(tokens[:length])


def _draw(key: str, count: int, ids: range) -> list[int]:
    digest = hashlib.sha256(key.encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little")).choices(ids, k=count)
