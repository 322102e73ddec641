"""Measured attention of one layer: prompts alone, decode alone, and both in one step."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from vllm_suite.planner.sources.base import FloatArray, Outside, SourceError
from vllm_suite.planner.sources.grid import Grid
from vllm_suite.planner.sources.skew import Skew
from vllm_suite.planner.sources.steps import DecodeLine, Steps

_COLUMNS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")


class AttentionTable:
    """Seconds of one layer's attention by the sums of a step.

    Three grids, as the kernel behaves differently in each case: chunk and prefix; sequences and context; all four.
    """

    def __init__(self, prefill: Grid, decode: Grid, both: Grid, skew: Skew | None, outside: Outside) -> None:
        self.prefill, self.decode, self.both, self.skew, self.outside = prefill, decode, both, skew, outside

    @classmethod
    def read(cls, path: Path, skew: Skew | None, outside: Outside) -> AttentionTable:
        """From ``attention.csv``. Raises SourceError naming the line."""
        rows = []
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for line, row in enumerate(csv.DictReader(file), 2):
                    try:
                        rows.append([float(row[name]) for name in _COLUMNS])
                    except (KeyError, TypeError, ValueError) as error:
                        raise SourceError(f"{path}:{line}: {', '.join(_COLUMNS)} are expected: {error!r}") from error
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        table = np.asarray(rows, dtype=float).reshape(-1, 5)
        table[:, 4] *= 1e-6
        chunk, sequences = table[:, 0] > 0, table[:, 2] > 0
        alone, decode, mixed = table[chunk & ~sequences], table[~chunk & sequences], table[chunk & sequences]
        if not (len(alone) and len(decode) and len(mixed)):
            raise SourceError(f"{path}: prompts alone, decode alone and both together are needed")
        # Numbers of sequences are whole: no interpolation is left to do along them.
        return cls(
            Grid.of_rows(alone[:, [0, 1, 4]]),
            Grid.of_rows(decode[:, [2, 3, 4]]).whole(0),
            Grid.of_rows(mixed).whole(2),
            skew,
            outside,
        )

    def seconds(self, steps: Steps) -> float:
        """Seconds of one step."""
        count = steps.decode_sequences
        if not steps.prefill_tokens:
            return self._decode(steps) if count else 0.0
        chunk, before = self._chunk(steps.prefill_tokens, steps.prefill_pairs)
        if not count:
            return self.prefill.at(chunk, before)
        mean_context = steps.decode_context / count
        context = self._context("kv_decode", mean_context)
        most = self.both.high(2)
        more = 0.0
        if count > most:
            # Beyond the mixed measurements the rest is added as decode alone costs it.
            count = self.outside.clamp("n_decode beside a prompt", count, 1, most)
            whole = min(steps.decode_sequences, self.decode.high(0))
            more = self.decode.at(whole, context) - self.decode.at(count, context)
        if self.skew is None or steps.decode_longest <= mean_context:
            return self.both.at(chunk, before, count, context) + more
        longest = self._context("kv_decode, longest", steps.decode_longest)
        share = self.skew.alpha(chunk, count, _rate(steps, mean_context), longest, before)
        mean, most_time = self.both.lines((chunk, before, count), context, longest)
        return max(0.0, mean.value + share * (most_time.value - mean.value)) + more

    def _decode(self, steps: Steps) -> float:
        return self.growth(steps).seconds

    def growth(self, steps: Steps) -> DecodeLine:
        """Decode alone, as every context grows by one a step; it holds up to the next measured context."""
        count = self._sequences(steps.decode_sequences)
        mean_context = steps.decode_context / steps.decode_sequences
        context = self._context("kv_decode", mean_context)
        longest = steps.decode_longest
        if self.skew is None or longest <= mean_context:
            line = self.decode.line(count, context)
            return DecodeLine(line.value, line.slope, line.ahead - context + 1)
        longest = self._context("kv_decode, longest", longest)
        mean, most = self.decode.lines((count,), context, longest)
        share = self.skew.alpha(0, count, _rate(steps, mean_context), longest, 0)
        return DecodeLine(
            max(0.0, mean.value + share * (most.value - mean.value)),
            mean.slope + share * (most.slope - mean.slope),
            max(1.0, min(mean.ahead - context, most.ahead - longest, self.skew.holds_to(longest) - longest) + 1),
        )

    def many(self, rows: Steps) -> FloatArray:
        """Seconds of many steps, given as arrays."""
        found = np.zeros(rows.prefill_tokens.shape)
        prompts, decodes = rows.prefill_tokens > 0, rows.decode_sequences > 0
        for chosen, ask in (
            (prompts & ~decodes, self._many_prompts),
            (~prompts & decodes, self._many_decodes),
            (prompts & decodes, self._many_mixed),
        ):
            if chosen.any():
                found[chosen] = ask(Steps(*(column[chosen] for column in rows)))
        return found

    def _many_prompts(self, rows: Steps) -> FloatArray:
        return self.prefill.many(*self._chunks(rows))

    def _many_decodes(self, rows: Steps) -> FloatArray:
        zero = np.zeros_like(rows.decode_sequences)
        count = self.outside.clamp_all("n_decode", rows.decode_sequences, 0, self.decode.high(0))
        context = self._contexts("kv_decode", rows.decode_context / rows.decode_sequences)
        mean = self.decode.many(count, context)
        differ, longest, share = self._shares(rows, zero, zero, count, context)
        if not differ.any():
            return mean
        return np.where(differ, np.maximum(0.0, mean + share * (self.decode.many(count, longest) - mean)), mean)

    def _many_mixed(self, rows: Steps) -> FloatArray:
        chunk, before = self._chunks(rows)
        most = self.both.high(2)
        count = self.outside.clamp_all("n_decode beside a prompt", rows.decode_sequences, 0, most)
        context = self._contexts("kv_decode", rows.decode_context / rows.decode_sequences)
        whole = np.minimum(rows.decode_sequences, self.decode.high(0))
        more = np.where(whole > most, self.decode.many(whole, context) - self.decode.many(count, context), 0.0)
        mean = self.both.many(chunk, before, count, context)
        differ, longest, share = self._shares(rows, chunk, before, count, context)
        if differ.any():
            top = self.both.many(chunk, before, count, longest)
            mean = np.where(differ, np.maximum(0.0, mean + share * (top - mean)), mean)
        return np.asarray(mean + more, dtype=float)

    def _shares(
        self, rows: Steps, chunk: FloatArray, before: FloatArray, count: FloatArray, context: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Where contexts differ, the longest of them, and α."""
        mean = rows.decode_context / rows.decode_sequences
        differ = rows.decode_longest > mean
        if self.skew is None or not differ.any():
            return np.zeros_like(differ), context, context
        longest = self._contexts("kv_decode, longest", np.where(differ, rows.decode_longest, context))
        spread = np.maximum(rows.decode_longest - rows.decode_shortest, 1e-9)
        rate = np.clip((mean - rows.decode_shortest) / spread, 0.0, 1.0)
        return differ, longest, self.skew.alphas(chunk, count, rate, longest, before)

    def _chunk(self, tokens: float, pairs: float) -> tuple[float, float]:
        """One chunk and its prefix with as many query-key pairs; without a prefix a shorter chunk where need be."""
        before = pairs / tokens - (tokens + 1) / 2
        if before < 0:
            tokens, before = max(1.0, (8 * pairs + 1) ** 0.5 / 2 - 0.5), 0.0
        if tokens > self.prefill.high(0):
            tokens = self.outside.clamp("prefill_chunk", tokens, 0, self.prefill.high(0))
        if before > self.prefill.high(1):
            before = self.outside.clamp("kv_prefill", before, 0, self.prefill.high(1))
        return tokens, before

    def _chunks(self, rows: Steps) -> tuple[FloatArray, FloatArray]:
        tokens, pairs = rows.prefill_tokens, rows.prefill_pairs
        before = pairs / tokens - (tokens + 1) / 2
        shorter = np.maximum(1.0, np.sqrt(8 * pairs + 1) / 2 - 0.5)
        tokens, before = np.where(before < 0, shorter, tokens), np.maximum(before, 0.0)
        tokens = self.outside.clamp_all("prefill_chunk", tokens, 0, self.prefill.high(0))
        return tokens, self.outside.clamp_all("kv_prefill", before, 0, self.prefill.high(1))

    def _sequences(self, count: float) -> float:
        return count if count <= self.decode.high(0) else self.outside.clamp("n_decode", count, 0, self.decode.high(0))

    def _context(self, axis: str, context: float) -> float:
        high = self.decode.high(1)
        return context if context <= high else self.outside.clamp(axis, context, 0, high)

    def _contexts(self, axis: str, contexts: FloatArray) -> FloatArray:
        return self.outside.clamp_all(axis, contexts, 0, self.decode.high(1))


def _rate(steps: Steps, mean: float) -> float:
    spread = steps.decode_longest - steps.decode_shortest
    return min(1.0, max(0.0, (mean - steps.decode_shortest) / spread)) if spread > 0 else 0.0
