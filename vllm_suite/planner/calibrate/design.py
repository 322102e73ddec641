"""The batches that a calibration measures: a grid over what a step's time depends on, within an engine's limits."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_suite.planner.sources.steps import Steps

# Contexts of one batch that differ: the shortest and the longest by this factor.
_UNEQUAL = 8
# Sequences of small batches that are measured however few points a factor of two has: kernels change from one to the
# next here, and an engine with little to do decodes nothing else.
_FEW = (2, 3, 6)


@dataclass(frozen=True)
class Cell:
    """One batch.

    Attributes:
        contexts: of each decoding sequence, the keys it attends to in the middle of the steps that are timed.
        chunks: of each prompt chunk its tokens and the tokens in the cache before it.
        steps: how many are timed each time the batch is set up.
    """

    contexts: tuple[int, ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    steps: int = 4

    @property
    def tokens(self) -> int:
        """Of the step."""
        return len(self.contexts) + sum(length for length, _ in self.chunks)

    @property
    def name(self) -> str:
        """For example ``4 x 512 + 128@1024``: four sequences decode, beside a chunk of 128 after 1024."""
        parts = []
        if self.contexts:
            low, high = min(self.contexts), max(self.contexts)
            parts.append(f"{len(self.contexts)} x {low}" if low == high else f"{len(self.contexts)} x {low}-{high}")
        parts += [f"{length}@{before}" for length, before in self.chunks]
        return " + ".join(parts)

    def sums(self) -> Steps:
        """As a source is asked for it."""
        return Steps.of(self.chunks, self.contexts)

    def as_job(self) -> dict[str, Any]:
        """For the process that drives the engine."""
        return asdict(self)


@dataclass(frozen=True)
class Range:
    """What of the engine is measured; its own limits by default.

    Attributes:
        max_num_seqs: sequences of a step.
        max_num_batched_tokens: tokens of a step.
        max_model_len: tokens of a sequence, prompt and output.
        kv_tokens: tokens that fit into the cache; a quarter of them is used at most.
        block: tokens of a block of the cache.
        dense: points per factor of two along the sizes of chunks and batches.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    kv_tokens: int
    block: int
    dense: float = 1.0


def grid(limits: Range) -> list[Cell]:
    """Batches of decode, of prompt chunks, and of both.

    Raises:
        ValueError: the window or the cache is too small for a grid.
    """
    longest = limits.max_model_len - 2 * 64
    if longest < 2 * limits.block or limits.max_num_batched_tokens < 16:
        raise ValueError(
            f"max_model_len {limits.max_model_len} with blocks of {limits.block} tokens, or"
            f" max_num_batched_tokens {limits.max_num_batched_tokens}, leaves no room for a grid"
        )
    return [
        # Long steps need fewer repetitions for the same time.
        replace(cell, steps=2) if cell.tokens >= 200 else cell
        for cell in dict.fromkeys([*_decode(limits, longest), *_prompts(limits, longest), *_mixed(limits, longest)])
        if cell.tokens <= limits.max_num_batched_tokens
        and len(cell.contexts) + len(cell.chunks) <= limits.max_num_seqs
        and 4 * (sum(cell.contexts) + sum(map(sum, cell.chunks))) <= limits.kv_tokens
    ]


def _decode(limits: Range, longest: int) -> Iterator[Cell]:
    contexts = _sizes(8, longest, 0.5)
    counts = _sizes(1, limits.max_num_seqs, limits.dense)
    for count in counts:
        for context in contexts:
            yield Cell((context,) * count)
    for count in _FEW:
        if count not in counts:
            for context in contexts[::2]:
                yield Cell((context,) * count)
    for count in _sizes(2, limits.max_num_seqs, limits.dense / 2):
        low = max(8, longest // (4 * _UNEQUAL))
        spread = [low + (low * (_UNEQUAL - 1)) * index // (count - 1) for index in range(count)]
        yield Cell(tuple(spread))


def _prompts(limits: Range, longest: int) -> Iterator[Cell]:
    budget, block = limits.max_num_batched_tokens, limits.block
    lengths = _sizes(8, min(budget, longest), limits.dense)
    # Only whole blocks are found in the cache, so only they can lie before a chunk.
    befores = sorted({0, *(size // block * block for size in (*_sizes(block, longest, 0.5), 3 * longest // 4))})
    for length in lengths:
        for before in befores:
            if length + before <= longest and (before == 0 or length >= 32 or length == lengths[0]):
                yield Cell(chunks=((length, before),))
    for count in _sizes(2, min(8, limits.max_num_seqs), 1.0):
        for share in (16, budget // (2 * count), budget // count):
            yield Cell(chunks=((max(1, min(share, longest)), 0),) * count)


def _mixed(limits: Range, longest: int) -> Iterator[Cell]:
    budget, block = limits.max_num_batched_tokens, limits.block
    for count in _sizes(2, limits.max_num_seqs - 1, limits.dense / 2):
        for length in (16, 64, budget // 4, budget // 2, budget - count):
            for context, before in ((longest // 8, 0), (longest // 3, longest // 2 // block * block)):
                if 0 < length <= longest - before:
                    yield Cell((context,) * count, ((length, before),))
    count = max(1, min(4, limits.max_num_seqs - 2))
    yield Cell((longest // 4,) * count, ((budget // 4, 0), (budget // 8, 0)))


def _sizes(low: int, high: int, dense: float) -> list[int]:
    """From low to high, both included, about `dense` points per factor of two."""
    found, size = [], float(low)
    while size < high / 1.3:
        found.append(round(size))
        size *= 2 ** (1 / dense)
    return [*found, high] if high >= low else []


def order(cells: int, cycles: int, seed: int) -> list[int]:
    """Every cell once a cycle, each cycle in an order of its own: a drift of the machine meets all cells alike."""
    draw = random.Random(seed)
    found: list[int] = []
    for _ in range(cycles):
        found += draw.sample(range(cells), cells)
    return found


def features_of(contexts: Sequence[float], chunks: Sequence[tuple[int, int]]) -> Steps:
    """As `Steps.of`, for contexts that are means of several steps."""
    whole = Steps.of(chunks, ())
    return whole._replace(
        decode_sequences=len(contexts),
        decode_context=float(sum(contexts)),
        decode_longest=float(max(contexts, default=0)),
        decode_shortest=float(min(contexts, default=0)),
    )
