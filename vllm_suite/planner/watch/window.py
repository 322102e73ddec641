"""What was seen of a fleet's traffic in a stretch of time, and the workload that such stretches make."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_suite.planner.traces.rows import Row
from vllm_suite.planner.traces.workload import Workload

Floats = np.ndarray[Any, np.dtype[np.float64]]
_BATCH = 4096


class WatchError(ValueError):
    """The metrics cannot be read, or are not what is expected; the text says which and what to do."""


@dataclass(frozen=True)
class Histogram:
    """Counts of requests by length.

    Attributes:
        bounds: upper bounds of the buckets, ascending, the last may be infinite; a bucket begins above the one before.
        counts: of each bucket.
        total: tokens summed.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    def __post_init__(self) -> None:
        if len(self.bounds) != len(self.counts) or any(
            a >= b for a, b in zip(self.bounds, self.bounds[1:], strict=False)
        ):
            raise WatchError(f"a histogram with {len(self.bounds)} ascending bounds and {len(self.counts)} counts")
        if any(not count >= 0 for count in self.counts) or not self.total >= 0:
            raise WatchError("a histogram with a negative count or sum")

    @property
    def count(self) -> float:
        """Requests."""
        return sum(self.counts)

    @property
    def mean(self) -> float:
        """Tokens; nan for no requests."""
        return self.total / self.count if self.count else math.nan

    @classmethod
    def joined(cls, several: Sequence[Histogram]) -> Histogram:
        """The sum. Raises WatchError where bounds differ: the engines were restarted with other buckets."""
        first = several[0]
        if any(each.bounds != first.bounds for each in several):
            raise WatchError("histograms with different buckets cannot be added; begin with a newer window")
        counts = np.sum([each.counts for each in several], axis=0)
        return cls(first.bounds, tuple(map(float, counts)), sum(each.total for each in several))


@dataclass(frozen=True)
class Window:
    """One stretch of time.

    Attributes:
        start, seconds: when it began, on the metrics' clock, and how long it was.
        requests: that were finished.
        prompts, outputs: their lengths.
    """

    start: float
    seconds: float
    requests: float
    prompts: Histogram
    outputs: Histogram

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @classmethod
    def joined(cls, several: Sequence[Window]) -> Window:
        """All of them as one."""
        return cls(
            several[0].start,
            sum(each.seconds for each in several),
            sum(each.requests for each in several),
            Histogram.joined([each.prompts for each in several]),
            Histogram.joined([each.outputs for each in several]),
        )


@dataclass(frozen=True)
class _Rows:
    """A seed to endless rows with the lengths of two histograms, which are drawn independently."""

    prompts: Histogram
    outputs: Histogram

    def __call__(self, seed: int) -> Iterator[Row]:
        draw = np.random.default_rng([seed, 3])
        while True:
            lengths = (_drawn(draw, self.prompts), _drawn(draw, self.outputs))
            for prompt, output in zip(*(each.tolist() for each in lengths), strict=True):
                yield Row(math.nan, prompt, output)


def _drawn(draw: np.random.Generator, histogram: Histogram) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Lengths, evenly within each bucket and then stretched so that the mean is the recorded one."""
    counts = np.array(histogram.counts)
    bounds = np.array(histogram.bounds)
    low = np.concatenate([[0.0], bounds[:-1]])
    # Nothing says how far the last bucket goes: as far again as it begins.
    high = np.where(np.isfinite(bounds), bounds, 2 * np.maximum(low, 1.0))
    expected = float((counts * (low + high + 1) / 2).sum() / counts.sum())
    place = draw.choice(len(counts), _BATCH, p=counts / counts.sum())
    values = low[place] + 1 + draw.random(_BATCH) * np.maximum(0.0, high[place] - low[place] - 1)
    whole: np.ndarray[Any, np.dtype[np.int64]] = np.maximum(1, np.rint(values * histogram.mean / expected))
    return whole.astype(np.int64)


def workload_of(windows: Sequence[Window], name: str = "recent traffic") -> Workload:
    """A workload with the rate and the lengths of some windows.

    Arrivals are Poisson, prompts and outputs are drawn independently of each other, and prefixes are not shared: a
    server's metrics say nothing of these.

    Raises:
        WatchError: no requests in the windows.
    """
    if not windows:
        raise WatchError("no windows to make a workload of")
    whole = Window.joined(windows)
    if not whole.requests or not whole.prompts.count or not whole.outputs.count:
        raise WatchError(f"no finished requests in {whole.seconds:g} s; nothing to plan for")
    content = repr((whole.prompts, whole.outputs, whole.rate))
    return Workload(
        name=name,
        rows=_Rows(whole.prompts, whole.outputs),
        count=None,
        rate=whole.rate,
        span=0.0,
        mean_prompt=whole.prompts.mean,
        mean_output=whole.outputs.mean,
        fingerprint=hashlib.sha256(content.encode()).hexdigest()[:16],
        notes=("from metrics: Poisson arrivals, prompts independent of outputs, no shared prefixes",),
    )
