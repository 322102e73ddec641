"""What attention costs more when the contexts of a decode batch differ: LLMServingSim's fitted share.

A batch of mixed contexts takes t_mean + α (t_max - t_mean), where t_mean and t_max are the times of batches all at the
mean and all at the longest context, and α is tabulated by the size of the prefill chunk, the number of sequences, where
the mean lies between the shortest and the longest context, the longest context, and the chunk's prefix.
"""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_suite.planner.sources.base import FloatArray, SourceError

_AXES = (("n", "n_label"), ("skew_rate", "skew_rate_label"), ("kv_big", "kv_big_label"), ("kp", "kp_label"))


class Skew:
    """The table of one model and tensor-parallel size. Buckets that were not measured take the fit's default."""

    def __init__(self, folder: Path, fit: Mapping[str, Any], tp: int) -> None:
        """Read ``skew_fit.csv`` of a folder by the axes that ``meta.yaml`` describes.

        Raises:
            SourceError: the description lacks an axis, or a row has a label that it does not name.
        """
        path = folder / "skew_fit.csv"
        try:
            axes = fit["bucket_axes"]
            self._edges = [list(map(float, axes[f"{name}_bins"]))[1:-1] for name, _ in _AXES]
            labels = [{label: i for i, label in enumerate(axes[f"{name}_labels"])} for name, _ in _AXES]
            default = float(fit["per_tp"][tp]["alpha_default"])
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{folder.parent / 'meta.yaml'}: skew_fit is incomplete: {error!r}") from error
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self._chunks: list[float] = sorted({float(row["pc"]) for row in rows})
        self._alpha = np.full([len(self._chunks), *(len(each) for each in labels)], default)
        for line, row in enumerate(rows, 2):
            try:
                place = [known[row[column]] for known, (_, column) in zip(labels, _AXES, strict=True)]
            except KeyError as error:
                raise SourceError(f"{path}:{line}: no bucket {error}") from error
            self._alpha[(self._chunks.index(float(row["pc"])), *place)] = float(row["alpha"])
        self._flat: list[float] = self._alpha.ravel().tolist()
        self._strides = [int(stride // self._alpha.itemsize) for stride in self._alpha.strides]
        self._array_edges = [np.asarray(edges) for edges in self._edges]

    def alpha(self, chunk: float, sequences: float, rate: float, longest: float, before: float) -> float:
        """α of one batch; `rate` is (mean - shortest) / (longest - shortest).

        It is interpolated between chunk sizes and between numbers of sequences, which were measured at the upper edges
        of their buckets. The buckets of the other axes hold several measured values each, and are taken whole.
        """
        index, counts = 0, self._edges[0]
        for edges, stride, value in zip(self._edges[1:], self._strides[2:], (rate, longest, before), strict=True):
            index += stride * bisect_left(edges, value)
        at, share = _between(self._chunks, chunk)
        index += at * self._strides[0]
        place = bisect_left(counts, sequences)
        index += place * self._strides[1]
        found = self._along_chunks(index, share)
        if 0 < place < len(counts) and sequences < counts[place]:
            back = (counts[place] - sequences) / (counts[place] - counts[place - 1])
            found += back * (self._along_chunks(index - self._strides[1], share) - found)
        return found

    def _along_chunks(self, index: int, share: float) -> float:
        low = self._flat[index]
        return low if not share else low + share * (self._flat[index + self._strides[0]] - low)

    def alphas(
        self, chunk: FloatArray, sequences: FloatArray, rate: FloatArray, longest: FloatArray, before: FloatArray
    ) -> FloatArray:
        """The same for arrays."""
        place = tuple(
            np.searchsorted(edges, values)
            for edges, values in zip(self._array_edges, (sequences, rate, longest, before), strict=True)
        )
        points = np.asarray(self._chunks)
        at = np.clip(np.searchsorted(points, chunk, side="right") - 1, 0, len(points) - 2)
        share = np.clip((chunk - points[at]) / (points[at + 1] - points[at]), 0.0, 1.0)
        counts = self._array_edges[0]
        upper = np.clip(place[0], 1, len(counts) - 1)
        back = np.clip((counts[upper] - sequences) / np.maximum(counts[upper] - counts[upper - 1], 1e-9), 0.0, 1.0)
        # In the first bucket, and beyond the last edge, there is nothing to interpolate to.
        back = np.where((place[0] > 0) & (place[0] < len(counts)), back, 0.0)
        found = self._many_along_chunks(at, place, share)
        lower = self._many_along_chunks(at, (np.maximum(place[0] - 1, 0), *place[1:]), share)
        return np.asarray(found + back * (lower - found), dtype=float)

    def _many_along_chunks(self, at: Any, place: tuple[Any, ...], share: FloatArray) -> FloatArray:
        low: FloatArray = self._alpha[(at, *place)]
        high: FloatArray = self._alpha[(at + 1, *place)]
        return low + share * (high - low)

    def holds_to(self, longest: float) -> float:
        """The longest context up to which α stays the same."""
        edges = self._edges[2]
        at = bisect_left(edges, longest)
        return edges[at] if at < len(edges) else float("inf")


def _between(points: Sequence[float], value: float) -> tuple[int, float]:
    at = max(0, bisect_left(points, value))
    if at < len(points) and points[at] == value:
        return at, 0.0
    if at == 0:
        return 0, 0.0
    if at == len(points):
        return len(points) - 1, 0.0
    return at - 1, (value - points[at - 1]) / (points[at] - points[at - 1])
