"""Where finished jobs go: columns of all of them, or a summary whose memory does not grow."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from typing import Any

from vllm_suite.planner.simulator.jobs import Job


class Records:
    """Every job's times, 11 numbers each. Called with finished jobs; columns are in order of completion.

    Seconds, but for `number`, `prompt`, `output`, `gaps` and `preemptions`. `mean_gap` is TPOT.
    """

    COLUMNS = ("number", "arrival", "prompt", "output", "first_scheduled", "first_token", "last_token", "gaps",
               "mean_gap", "longest_gap", "preemptions")  # fmt: skip

    def __init__(self) -> None:
        self.columns: dict[str, array[Any]] = {name: array("q" if name in _COUNTS else "d") for name in self.COLUMNS}
        self._appends = [self.columns[name].append for name in self.COLUMNS]

    def __call__(self, job: Job, now: float) -> None:
        row = (job.number, job.arrival, job.prompt, job.output, job.first_scheduled, job.first_token, job.last_token,
               job.output - 1, job.tpot, job.longest_gap, job.preemptions)  # fmt: skip
        for append, value in zip(self._appends, row, strict=True):
            append(value)

    def __len__(self) -> int:
        return len(self.columns["number"])

    def __getitem__(self, name: str) -> array[Any]:
        return self.columns[name]


_COUNTS = frozenset({"number", "prompt", "output", "gaps", "preemptions"})


class Quantiles:
    """Quantiles of positive numbers from counts in bins whose edges grow by a factor; mean and maximum are exact.

    A quantile is off by at most `accuracy`, relatively. Values below a nanosecond count as 0.
    """

    def __init__(self, accuracy: float = 0.001) -> None:
        self.count, self.total, self.most = 0, 0.0, 0.0
        growth = (1 + accuracy) / (1 - accuracy)
        self._scale = 1 / math.log(growth)
        self._middle = 2 / (1 + growth)
        self._bins: dict[int, int] = {}
        self._zeros = 0

    def add(self, value: float) -> None:
        """Count one value, at least 0."""
        self.count += 1
        self.total += value
        if value > self.most:
            self.most = value
        if value < 1e-9:
            self._zeros += 1
            return
        index = math.ceil(math.log(value) * self._scale)
        self._bins[index] = self._bins.get(index, 0) + 1

    @property
    def mean(self) -> float:
        """nan where nothing was counted."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, q: float) -> float:
        """The value below which a share `q` lies, as the lower of the two where it falls between; nan for none."""
        if not self.count:
            return math.nan
        left = math.floor(q * (self.count - 1)) - self._zeros
        if left < 0:
            return 0.0
        for index in sorted(self._bins):
            left -= self._bins[index]
            if left < 0:
                return min(self.most, math.exp(index / self._scale) * self._middle)
        return self.most


@dataclass
class Summary:
    """Distributions and joint attainment. Called with finished jobs; its memory does not grow with them.

    Attributes:
        ttft_slo, tpot_slo: seconds; a job attains if both hold.
        since: jobs that arrived earlier, in seconds, are left out.
        ttft, tpot, longest_gap, latency: seconds.
        attained: jobs that met both targets.
        tokens: generated.
    """

    ttft_slo: float = math.inf
    tpot_slo: float = math.inf
    since: float = 0.0
    ttft: Quantiles = field(default_factory=Quantiles)
    tpot: Quantiles = field(default_factory=Quantiles)
    longest_gap: Quantiles = field(default_factory=Quantiles)
    latency: Quantiles = field(default_factory=Quantiles)
    attained: int = 0
    tokens: int = 0
    preemptions: int = 0

    def __call__(self, job: Job, now: float) -> None:
        if job.arrival < self.since:
            return
        ttft, tpot = job.ttft, job.tpot
        self.ttft.add(ttft)
        self.tokens += job.output
        self.preemptions += job.preemptions
        self.latency.add(job.last_token - job.arrival)
        if job.output > 1:
            self.tpot.add(tpot)
            self.longest_gap.add(job.longest_gap)
        if ttft <= self.ttft_slo and tpot <= self.tpot_slo:
            self.attained += 1

    @property
    def attainment(self) -> float:
        """Share of jobs that met both targets; nan where there was none."""
        return self.attained / self.ttft.count if self.ttft.count else math.nan
