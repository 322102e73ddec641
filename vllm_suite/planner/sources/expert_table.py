"""Measured experts of one layer: ``moe.csv`` of a profile in LLMServingSim's layout."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from vllm_suite.planner.models import ModelError, Parallel
from vllm_suite.planner.models.shapes import Layer, Linear
from vllm_suite.planner.sources.base import FloatArray, SourceError


class ExpertTable:
    """Seconds of a layer's experts on one rank, by its tokens and by the different experts that they reach.

    A profile with a column ``ep`` was measured with the experts spread over that many ranks, each token bringing its
    share of assignments; one without was measured on a single rank with all of them. Where the plan's own spread was
    not measured the latter answers: n tokens of which half the assignments stay on the rank are n / 2 tokens.
    """

    def __init__(self, rows: dict[float, tuple[list[float], list[float]]], spread: int) -> None:
        self.spread = spread
        self._tokens = sorted(rows)
        self._rows = [rows[tokens] for tokens in self._tokens]

    @classmethod
    def read(cls, path: Path, ranks: int) -> ExpertTable:
        """The rows that were measured with that many expert-parallel ranks, else those with one.

        Raises:
            SourceError: no such file, a row that does not fit, or neither kind of rows.
        """
        found: dict[int, dict[float, dict[float, float]]] = {}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for line, row in enumerate(csv.DictReader(file), 2):
                    try:
                        tokens = found.setdefault(int(row.get("ep") or 1), {}).setdefault(float(row["tokens"]), {})
                        tokens[float(row["activated_experts"])] = float(row["time_us"]) * 1e-6
                    except (KeyError, TypeError, ValueError) as error:
                        what = "tokens, activated_experts and time_us are expected"
                        raise SourceError(f"{path}:{line}: {what}: {error!r}") from error
        except OSError as error:
            raise SourceError(f"{path}: {error.strerror or error}") from error
        spread = ranks if ranks in found else 1
        if spread not in found:
            raise SourceError(f"{path}: no rows for {ranks} expert-parallel ranks, nor for one")
        rows = {tokens: (sorted(times), [times[n] for n in sorted(times)]) for tokens, times in found[spread].items()}
        return cls(rows, spread)

    @property
    def most(self) -> float:
        """The largest number of tokens that was measured."""
        return self._tokens[-1]

    def at(self, tokens: float, reached: float) -> float:
        """Linear between the measured numbers of tokens, and for each of these between those of experts.

        Which numbers of experts were measured differs with the tokens; beyond them the nearest one answers.
        """
        at = int(np.searchsorted(self._tokens, tokens, side="right")) - 1
        low = self._row(max(at, 0), reached)
        if at < 0 or at == len(self._tokens) - 1:
            return low
        share = (tokens - self._tokens[at]) / (self._tokens[at + 1] - self._tokens[at])
        return low + share * (self._row(at + 1, reached) - low)

    def _row(self, at: int, reached: float) -> float:
        sizes, times = self._rows[at]
        return float(np.interp(reached, sizes, times))

    def seconds(self, layer: Layer, parallel: Parallel, most: int, imbalance: float) -> FloatArray:
        """Seconds by the tokens of one data-parallel rank, 0 to `most`, every other rank having as many.

        Where only the imbalance takes the busiest rank beyond the measured tokens, its time grows in proportion.
        """
        experts = _experts(layer)
        ranks = parallel.expert_ranks if parallel.ep else 1
        found = np.zeros(most + 1)
        for tokens in range(1, most + 1):
            everyone = tokens * parallel.dp
            reached = experts.experts / ranks * (1.0 - (1.0 - experts.used / experts.experts) ** everyone)
            here = (everyone if self.spread == ranks else everyone / ranks) * (imbalance if ranks > 1 else 1.0)
            found[tokens] = self.at(here, max(1.0, reached)) * max(1.0, here / self.most)
        return found

    def limit(self, parallel: Parallel) -> int:
        """Tokens of one data-parallel rank up to which the table answers."""
        ranks = parallel.expert_ranks if parallel.ep else 1
        return int(self.most * (1 if self.spread == ranks else ranks) / parallel.dp)


def _experts(layer: Layer) -> Linear:
    found = next((linear for linear in layer.linears if linear.experts > 1), None)
    if found is None:
        raise ModelError("a layer without experts was asked for its experts")
    return found
