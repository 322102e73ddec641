"""Attention out of AIConfigurator's tables: prompts by chunks and length, decode by sequences and context."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import FloatArray, Outside, SourceError
from vllm_suite.planner.sources.steps import Steps

CACHE_TYPES = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8"}


class Kernel(NamedTuple):
    """Which attention kernel: on one rank `heads`, `kv_heads` of width `head`, `window` or None, cache format `kv`.

    `module` is None, or for latent attention the format of the projections, which were measured with it.
    """

    heads: int
    kv_heads: int
    head: int
    window: int | None
    kv: str
    module: str | None = None


class Surface:
    """Seconds over two measured axes, linear between points; an outer product of them is filled from its neighbours."""

    def __init__(self, rows: FloatArray) -> None:
        self.first, at = np.unique(rows[:, 0], return_inverse=True)
        self.second, along = np.unique(rows[:, 1], return_inverse=True)
        values = np.full((len(self.first), len(self.second)), np.nan)
        values[at, along] = rows[:, 2]
        for index in range(1, len(self.first)):
            # More sequences than were measured at this length: in proportion, as the kernel is saturated there.
            missing = np.isnan(values[index])
            values[index, missing] = values[index - 1, missing] * self.first[index] / self.first[index - 1]
        if np.isnan(values).any():
            raise SourceError("an attention table has gaps that its other points do not determine")
        self.values = values
        self._points: list[float] = self.second.tolist()
        self._lines: dict[int, list[float]] = {}

    def line(self, count: int) -> list[float]:
        """The values along the second axis for a whole number on the first; beyond its end in proportion."""
        if count not in self._lines:
            most = self.first[-1]
            at = min(float(count), float(most))
            found = np.array([np.interp(at, self.first, column) for column in self.values.T])
            self._lines[count] = (found * max(1.0, count / most)).tolist()
        return self._lines[count]

    def at(self, count: int, place: float) -> tuple[float, float, float]:
        """Value, slope along the second axis, and where that slope ends; past the last point the last slope goes on."""
        points, line = self._points, self.line(count)
        if place < points[0]:
            return line[0], 0.0, points[0]
        index = min(bisect_right(points, place) - 1, len(points) - 2)
        slope = (line[index + 1] - line[index]) / (points[index + 1] - points[index])
        ahead = points[index + 1] if index < len(points) - 2 else np.inf
        return line[index] + slope * (place - points[index]), slope, ahead

    def many(self, counts: FloatArray, places: FloatArray) -> FloatArray:
        """Values at many points, as `at` gives them; `counts` are whole numbers."""
        found = np.zeros(np.shape(counts))
        for count in np.unique(counts):
            here = counts == count
            if count >= 1:
                line, points = np.asarray(self.line(int(count))), self.second
                index = np.clip(np.searchsorted(points, places[here], side="right") - 1, 0, len(points) - 2)
                slope = (line[index + 1] - line[index]) / (points[index + 1] - points[index])
                place = np.maximum(places[here], points[0])
                found[here] = line[index] + slope * (place - points[index])
        return found


class AttentionTimes:
    """Seconds of one kernel in a step, of one layer on one rank.

    The chunks of a step are taken as equal; their query-key pairs are the step's. Prompts and decoded tokens of a step
    run one after the other.
    """

    def __init__(self, tables: AicTables, kernel: Kernel, outside: Outside) -> None:
        self.kernel, self.outside = kernel, outside
        self.prompts = Surface(_rows(tables, kernel, "context"))
        self.decode = Surface(_rows(tables, kernel, "generation"))
        self.longest_prompt, self.longest = float(self.prompts.second[-1]), float(self.decode.second[-1])

    def _limited(self, context: float) -> float:
        window = self.kernel.window
        return context if window is None or context <= window else float(window)

    def prompt_seconds(self, tokens: float, chunks: float, context: float, pairs: float) -> float:
        """Of the prompt chunks of a step; the arguments are `Steps`' fields."""
        count = max(1, int(chunks))
        chunk, full = tokens / count, self._limited((tokens + context) / count)
        self.outside.clamp("prompt length", full, 0, self.longest_prompt)
        measured = min(max(full, 1.0), self.longest_prompt)
        whole = self.prompts.at(count, measured)[0]
        floor = self.prompts.at(count, min(chunk, measured))[0]
        if self.kernel.window is not None:
            pairs = min(pairs, self.kernel.window * tokens)
        # A chunk after others costs its share of the pairs, and at least what it would cost as the first one.
        return max(floor, whole * pairs / (count * measured * (measured + 1) / 2))

    def decode_seconds(self, sequences: int, context: float) -> tuple[float, float, float]:
        """Of `sequences` with a mean context: seconds, slope with it, and the context up to which that slope holds."""
        limited = self._limited(context)
        self.outside.clamp("context", limited, 0, self.longest)
        seconds, slope, ahead = self.decode.at(sequences, limited)
        if self.kernel.window is not None:
            if limited < context or limited == self.kernel.window:
                return seconds, 0.0, np.inf
            ahead = min(ahead, float(self.kernel.window))
        return seconds, slope, ahead

    def many(self, rows: Steps) -> FloatArray:
        """Of many steps, as arrays of floats of one shape."""
        window = np.inf if self.kernel.window is None else float(self.kernel.window)
        count = np.maximum(1.0, rows.prefill_chunks)
        chunk = rows.prefill_tokens / count
        full = np.minimum((rows.prefill_tokens + rows.prefill_context) / count, window)
        self.outside.clamp_all("prompt length", full, 0, self.longest_prompt)
        measured = np.clip(full, 1.0, self.longest_prompt)
        pairs = rows.prefill_pairs
        if self.kernel.window is not None:
            pairs = np.minimum(pairs, window * rows.prefill_tokens)
        whole = self.prompts.many(count, measured) * pairs / (count * measured * (measured + 1) / 2)
        prompts = np.maximum(self.prompts.many(count, np.minimum(chunk, measured)), whole)
        mean = np.minimum(rows.decode_context / np.maximum(1.0, rows.decode_sequences), window)
        self.outside.clamp_all("context", mean, 0, self.longest)
        decode = self.decode.many(rows.decode_sequences, mean)
        beside = np.where(rows.decode_sequences > 0, decode, 0.0)
        seconds: FloatArray = np.where(rows.prefill_tokens > 0, prompts, 0.0) + beside
        return seconds


def _rows(tables: AicTables, kernel: Kernel, phase: str) -> FloatArray:
    """Batch, length and seconds of a phase. Raises SourceError where the kernel was not measured."""
    cache = CACHE_TYPES.get(kernel.kv)
    if cache is None:
        raise SourceError(f"aic: attention over a {kernel.kv} cache was not measured; {', '.join(CACHE_TYPES)} were")
    numbers = ("num_heads", "batch_size", "isl" if phase == "context" else "step")
    if kernel.module is not None:
        where: Mapping[str, Any] = {"kv_cache_dtype": cache, "gemm_type": kernel.module}
        found = tables.rows("mla", f"mla_{phase}_module_perf.parquet", numbers, where)
    else:
        where = {"kv_cache_dtype": cache, "head_dim": kernel.head, "window_size": 0, "attn_dtype": "bfloat16"}
        where |= {"num_key_value_heads": kernel.kv_heads}
        found = tables.rows("attention", f"{phase}_attention_perf.parquet", numbers, where)
    if phase == "generation" and len(found):
        found = found + np.array([0.0, 0.0, 1.0, 0.0])  # The step's own token is attended to as well.
    heads = np.unique(found[:, 0]) if len(found) else np.empty(0)
    if len(heads) == 0 or not heads[0] <= kernel.heads <= heads[-1]:
        raise SourceError(
            f"{tables.system}: attention of {kernel.heads} heads of {kernel.head}, {kernel.kv_heads} of the cache"
            f" ({kernel.kv}) was not measured"
        )
    at = int(np.searchsorted(heads, kernel.heads))
    near: FloatArray = found[found[:, 0] == heads[at]][:, 1:]
    if heads[at] == kernel.heads:
        return near
    # Heads between two measured numbers: linear, at the points that both have.
    below = {(row[0], row[1]): row[2] for row in found[found[:, 0] == heads[at - 1]][:, 1:]}
    share = (kernel.heads - heads[at - 1]) / (heads[at] - heads[at - 1])
    both = [
        (row[0], row[1], below[row[0], row[1]] * (1 - share) + row[2] * share)
        for row in near
        if (row[0], row[1]) in below
    ]
    return np.array(both)
