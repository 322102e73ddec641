"""The form of a step's time, as numbers that a file holds, and its evaluation."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from vllm_suite.planner.sources.base import FloatArray
from vllm_suite.planner.sources.steps import Steps

SMALL = 16
"""Tokens up to which a step may take less time than one with fewer tokens."""

TERMS = ("constant", "chunk", "before", "pair", "sequence", "key")


@dataclass(frozen=True)
class StepModel:
    """Seconds of a step, all numbers but slopes of small steps at least 0.

    The matrix products cost a function of the step's tokens, linear between `knots`: reading the weights sets the price
    of a small step, arithmetic that of a large one, and kernels change in between. It grows beyond `SMALL` tokens;
    below, another kernel may make a larger step the shorter one. The rest is linear.

    Attributes:
        knots: tokens, from 1 on; the function is known up to the last one.
        slopes: seconds per token between one knot and the next; one fewer than knots.
        constant: of a step of one token.
        chunk: per prompt chunk.
        before: per token in the cache before a prompt chunk.
        pair: per query-key pair of prompt chunks.
        sequence: per decoding sequence, beside its token.
        key: per key that decoding sequences attend to.
    """

    knots: tuple[float, ...]
    slopes: tuple[float, ...]
    constant: float
    chunk: float
    before: float
    pair: float
    sequence: float
    key: float

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """Seconds at the knots, for the tokens alone."""
        widths = np.diff(self.knots)
        return tuple(np.concatenate([[0.0], np.cumsum(widths * np.asarray(self.slopes))]).tolist())

    def tokens_seconds(self, tokens: float) -> float:
        """Of the tokens alone; beyond the last knot as between the last two."""
        place = min(max(bisect_right(self.knots, tokens) - 1, 0), len(self.slopes) - 1)
        return self.levels[place] + self.slopes[place] * max(0.0, tokens - self.knots[place]) if self.slopes else 0.0

    def step_seconds(self, steps: Steps) -> float:
        """Of one step with at least one token."""
        found: float = (
            self.constant
            + self.tokens_seconds(steps.prefill_tokens + steps.decode_sequences)
            + self.chunk * steps.prefill_chunks
            + self.before * steps.prefill_context
            + self.pair * steps.prefill_pairs
            + self.sequence * steps.decode_sequences
            + self.key * steps.decode_context
        )
        return found

    def seconds(self, steps: Steps) -> FloatArray:
        """The same for arrays of one shape."""
        row = design_matrix(steps, self.knots)
        found: FloatArray = row @ np.asarray(self.vector)
        return found

    @property
    def vector(self) -> tuple[float, ...]:
        """Its numbers in the order of `design_matrix`."""
        return (*(getattr(self, name) for name in TERMS), *self.slopes)

    @classmethod
    def of_vector(cls, vector: FloatArray, knots: tuple[float, ...]) -> StepModel:
        """From numbers in that order."""
        values = [float(value) for value in vector]
        return cls(knots, tuple(values[len(TERMS) :]), *values[: len(TERMS)])

    def blended(self, other: StepModel, share: float) -> StepModel:
        """Between this (0) and another with the same knots (1)."""
        mixed = (1 - share) * np.asarray(self.vector) + share * np.asarray(other.vector)
        return StepModel.of_vector(mixed, self.knots)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {"knots": list(self.knots), "slopes": list(self.slopes), **{name: getattr(self, name) for name in TERMS}}


def design_matrix(steps: Steps, knots: tuple[float, ...]) -> FloatArray:
    """What each number of the model is multiplied by, as the last axis: the terms, then tokens within each interval."""
    sums = [np.asarray(each, dtype=float) for each in steps]
    tokens, chunks, before, pairs, sequences, keys, *_ = np.broadcast_arrays(*sums)
    every = tokens + sequences
    within = [np.clip(every - low, 0.0, high - low) for low, high in pairwise(knots)]
    return np.stack([np.where(every > 0, 1.0, 0.0), chunks, before, pairs, sequences, keys, *within], axis=-1)
