"""What engine steps compute, as the sums that their time depends on; and what a run of decode steps takes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Steps(NamedTuple):
    """One engine step, or many: numbers, or arrays of one shape. All at least 0.

    Sums over sequences suffice, and a scheduler can keep them up to date without a loop over its sequences.

    Attributes:
        prefill_tokens: tokens of prompt chunks, and of contexts computed again after a preemption.
        prefill_chunks: number of these chunks, at most one for each sequence.
        prefill_context: tokens in the cache before each chunk, summed.
        prefill_pairs: pairs of a query and a key that it attends to: for a chunk of c tokens after k tokens in the
            cache c k + c (c + 1) / 2, summed.
        decode_sequences: sequences that decode one token.
        decode_context: keys that these attend to, their new token included, summed.
        decode_longest, decode_shortest: the largest and the smallest of these contexts; 0 where nobody kept them, which
            is read as all being equal.
    """

    prefill_tokens: Any = 0
    prefill_chunks: Any = 0
    prefill_context: Any = 0
    prefill_pairs: Any = 0
    decode_sequences: Any = 0
    decode_context: Any = 0
    decode_longest: Any = 0
    decode_shortest: Any = 0

    @classmethod
    def of(cls, chunks: Iterable[tuple[int, int]] = (), contexts: Iterable[int] = ()) -> Steps:
        """One step.

        Args:
            chunks: tokens of each prompt chunk, and tokens in the cache before it.
            contexts: of each decoding sequence the keys it attends to, the new token included.
        """
        chunk_list, context_list = list(chunks), list(contexts)
        return cls(
            sum(tokens for tokens, _ in chunk_list),
            len(chunk_list),
            sum(before for _, before in chunk_list),
            sum(pairs(tokens, before) for tokens, before in chunk_list),
            len(context_list),
            sum(context_list),
            max(context_list, default=0),
            min(context_list, default=0),
        )

    @property
    def tokens(self) -> Any:
        """Tokens that the layers run over."""
        return self.prefill_tokens + self.decode_sequences

    @property
    def sequences(self) -> Any:
        """Sequences with a token in the step; as many rows of logits are computed."""
        return self.prefill_chunks + self.decode_sequences

    @property
    def kv_tokens(self) -> Any:
        """Context summed over all sequences, the step's own tokens included."""
        return self.prefill_context + self.prefill_tokens + self.decode_context


def pairs(tokens: int, before: int) -> float:
    """Query-key pairs of a chunk of `tokens` after `before` tokens in the cache."""
    return tokens * before + tokens * (tokens + 1) / 2


@dataclass(frozen=True, slots=True)
class DecodeLine:
    """A run of decode steps of the same sequences, each context growing by one a step.

    Step i = 0, 1, … of the run takes ``seconds + slope * i``. It holds for the first `steps` steps; then the source has
    to be asked again.
    """

    seconds: float
    slope: float
    steps: float = math.inf

    def total(self, count: int) -> float:
        """Seconds of the first `count` steps."""
        return count * self.seconds + self.slope * (count * (count - 1) / 2)

    def within(self, seconds: float) -> int:
        """How many whole steps end within that time, however many the line holds for."""
        if seconds < self.seconds:
            return 0
        if abs(self.slope) * seconds < 1e-12 * self.seconds**2:
            count = int(seconds / self.seconds)
        else:
            # slope/2 n² + (seconds - slope/2) n = time
            b = self.seconds - self.slope / 2
            root = b * b + 2 * self.slope * seconds
            count = int(2 * seconds / (b + math.sqrt(root))) if root >= 0 else 0
        # The root is off by at most one step.
        while self.total(count + 1) <= seconds:
            count += 1
        while count and self.total(count) > seconds:
            count -= 1
        return count
