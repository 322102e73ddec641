"""Times of finished requests as sums and histograms over stretches of the arrival clock: memory that does not grow."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from vllm_suite.planner.plan import Slo
from vllm_suite.planner.simulator.served import Served

Floats = np.ndarray[Any, np.dtype[np.float64]]

STRETCHES = 64
"""Of equal length, from the first arrival on; they double in length as the run goes on."""

METRICS = ("ttft", "tpot", "latency", "longest_gap")
"""With quantiles."""

STAGES = ("queue", "encode", "fetch", "prefill", "transfer", "decode_wait", "decode", "beside_steps")
"""With means, over the requests that went through them. `queue` is time in which no stage was at work, up to the first
step of the last instance; `decode_wait` is the part of it there; `fetch` is of encoders' outputs, `transfer` of keys
and values; `decode` is from the first to the last token; `beside_steps` is what was measured beside all of them."""

ACCURACY = 0.0025
"""By how much a quantile may be off, relatively."""

_SMALLEST, _LARGEST = 1e-6, 1e6
_GROWTH = math.log((1 + ACCURACY) / (1 - ACCURACY))
_BINS = math.ceil(math.log(_LARGEST / _SMALLEST) / _GROWTH) + 2
_MIDDLE = np.concatenate([[0.0], _SMALLEST * np.exp((np.arange(1, _BINS) - 0.5) * _GROWTH)])
_BLOCK = 4096

COLUMNS = ("count", "attained", "ttft_met", "tpot_met", "decoding", "prompt", "output", "prompt_squares",
           "output_squares", "cached", "preemptions", *METRICS, *STAGES,
           *(f"{stage}s" for stage in STAGES))  # fmt: skip
"""Sums in each stretch, by arrival. `decoding` counts requests of more than one token, which alone have a TPOT and
gaps; the last columns count requests that went through a stage."""

PLACE = {name: index for index, name in enumerate(COLUMNS)}


class Tally:
    """A sink that sums up what it is given.

    Attributes:
        width: seconds of a stretch.
        sums: [stretch, column of `COLUMNS`], by arrival.
        counts: histograms [stretch, metric, bin], by arrival.
        last_arrival, most: of all requests; the largest of each metric.
    """

    def __init__(self, slo: Slo) -> None:
        self.slo, self.width = slo, 0.0
        self.sums = np.zeros((STRETCHES, len(COLUMNS)))
        self.counts = np.zeros((STRETCHES, len(METRICS), _BINS), dtype=np.int32)
        self.last_arrival, self.most = 0.0, np.zeros(len(METRICS))
        self._rows: list[tuple[float, ...]] = []

    def __call__(self, served: Served) -> None:
        """Count a finished request."""
        self._rows.append(
            (served.arrival, served.encode_start, served.encoded, served.fetched, served.prefill_start,
             served.prefilled, served.transfer_start, served.transferred, served.decode_start, served.first_token,
             served.last_token, served.longest_gap, served.output, served.prompt, served.cached, served.preemptions,
             served.beyond)
        )  # fmt: skip
        if len(self._rows) == _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Sum up what came since the last time. Raises ValueError for a request without times."""
        if not self._rows:
            return
        table = np.array(self._rows)
        self._rows.clear()
        arrival, first, last, gap, output = table[:, [0, 9, 10, 11, 12]].T
        self.last_arrival = max(self.last_arrival, float(arrival.max()))
        while self.last_arrival >= self.width * STRETCHES:
            self._widen()
        several = output > 1
        ttft, latency = first - arrival + table[:, 16], last - arrival + table[:, 16]
        if np.isnan(latency + ttft).any():
            raise ValueError("a request ended without the times of its first and its last token")
        tpot = np.where(several, (last - first) / np.maximum(output - 1, 1), 0.0)
        quick = np.ones(len(table), dtype=bool) if self.slo.ttft is None else ttft <= self.slo.ttft
        fluent = np.ones(len(table), dtype=bool) if self.slo.tpot is None else tpot <= self.slo.tpot
        metrics = np.stack([ttft, tpot, latency, np.where(several, gap, 0.0)])
        stages = _stages(table)
        there = ~np.isnan(stages)
        lengths = table[:, [13, 12]].T
        columns = [np.ones(len(table)), quick & fluent, quick, fluent, several, *lengths, *lengths**2,
                   *table[:, [14, 15]].T, *metrics, *np.where(there, stages, 0.0), *there]  # fmt: skip
        self.most = np.maximum(self.most, metrics.max(axis=1))
        place = np.minimum((arrival / self.width).astype(np.int64), STRETCHES - 1)
        for index, values in enumerate(columns):
            self.sums[:, index] += np.bincount(place, values, STRETCHES)
        flat = self.counts.reshape(-1)
        for index, values in enumerate(metrics):
            # Requests of one token have no TPOT and no gap.
            some = several if METRICS[index] in ("tpot", "longest_gap") else slice(None)
            np.add.at(flat, (place[some] * len(METRICS) + index) * _BINS + _bins(values[some]), 1)

    def _widen(self) -> None:
        if self.width == 0:
            self.width = max(1e-6, self.last_arrival * (2 / STRETCHES))
            return
        self.width *= 2
        for each in (self.sums, self.counts):
            half = each.reshape(STRETCHES // 2, 2, *each.shape[1:]).sum(axis=1)
            each[: STRETCHES // 2], each[STRETCHES // 2 :] = half, 0

    def quantile(self, metric: str, q: float, begin: int = 0, end: int = STRETCHES) -> float:
        """The value that a share `q` of the requests that arrived in some stretches stays under; nan for none."""
        index = METRICS.index(metric)
        counts = np.cumsum(self.counts[begin:end, index].sum(axis=0))
        total = int(counts[-1])
        if not total:
            return math.nan
        place = int(np.searchsorted(counts, math.ceil(q * total - 1e-9), side="left")) if q > 0 else 0
        return float(min(_MIDDLE[place], self.most[index]))

    def distribution(self, metric: str, begin: int = 0, end: int = STRETCHES) -> tuple[Floats, Floats]:
        """Seconds and the share of requests that stays under them, for a curve; empty for none."""
        counts = self.counts[begin:end, METRICS.index(metric)].sum(axis=0)
        some = np.flatnonzero(counts)
        return _MIDDLE[some], np.cumsum(counts[some]) / max(1, counts.sum())


def _bins(values: Floats) -> np.ndarray[Any, np.dtype[np.int64]]:
    place = np.ceil(np.log(np.maximum(values, 1e-12) / _SMALLEST) / _GROWTH)
    return np.clip(place, 0, _BINS - 1).astype(np.int64)


def _stages(table: Floats) -> Floats:
    """[stage, request] in the order of `STAGES`, nan where a request has no such stage."""
    arrival, encode, encoded, fetched, prefill, prefilled, pull, pulled, decode, first, last = table[:, :11].T
    beyond = table[:, 16]
    waited, ready = np.zeros(len(table)), arrival.copy()
    for start, end in ((encode, np.fmax(encoded, fetched)), (prefill, prefilled), (pull, pulled), (decode, decode)):
        # fmax leaves nan out.
        waited += np.fmax(0.0, np.where(np.isnan(start), 0.0, start - ready))
        ready = np.fmax(ready, end)
    wait = np.fmax(0.0, decode - np.fmax(pulled, prefilled))
    return np.stack(
        [waited, encoded - encode, fetched - encoded, prefilled - prefill, pulled - pull,
         np.where(np.isnan(decode), math.nan, wait), last - first, np.where(beyond == 0, math.nan, beyond)]
    )  # fmt: skip
