"""A workload: lengths, arrivals and shared content of requests, to be drawn at any rate as often as wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from vllm_suite.fleet.traces import TraceError
from vllm_suite.planner.traces.arrivals import drawn
from vllm_suite.planner.traces.rows import BLOCK, Row
from vllm_suite.planner.workload import Item, Request

Rows = Callable[[int], Iterable[Row]]
"""A seed to all rows, in order of arrival. Recorded ones are the same for every seed."""


@dataclass(frozen=True)
class Workload:
    """What `load` and `synthetic` give.

    Attributes:
        name: for reports.
        rows: draws them; see `Rows`.
        count: how many there are; None for endless ones.
        rate: mean requests per second as recorded or asked for; None where there is none.
        span: seconds between the first and the last; 0 where no arrivals were recorded.
        mean_prompt, mean_output: tokens; a prompt with its items.
        cv: coefficient of variation of the intervals that are drawn where none were recorded.
        items: of every request.
        fingerprint: equal for equal content, whatever the file is called.
        notes: what was left out or replaced in reading.
    """

    name: str
    rows: Rows
    count: int | None
    rate: float | None
    span: float
    mean_prompt: float
    mean_output: float
    fingerprint: str
    cv: float = 1.0
    items: tuple[Item, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recorded(self) -> bool:
        """Whether arrivals were recorded, so that their pattern is kept."""
        return self.span > 0

    def requests(
        self, rate: float | None = None, limit: int | None = None, seed: int = 0, *, repeat: bool = False
    ) -> Iterator[Request]:
        """Requests in order of arrival from 0 on; drawn lazily, so any length takes no memory.

        Recorded arrivals are stretched by one factor, so that the first `limit` of them have the mean rate asked for,
        and bursts stay what they are relative to it. Others are drawn, by `cv`.

        Args:
            rate: requests per second; None for the workload's own.
            limit: so many at most.
            seed: of what is drawn; recorded lengths and arrivals do not depend on it.
            repeat: begin again after the last recorded request, with other shared content, until `limit`.

        Raises:
            TraceError: no rate is known, or an endless workload without a limit.
        """
        if limit is None and (self.count is None or repeat):
            raise TraceError(f"{self.name}: endless requests need a limit")
        if limit is not None and limit < 1:
            raise TraceError(f"{self.name}: a limit of {limit} requests")
        wanted = self.rate if rate is None else rate
        if wanted is None or not 0 < wanted < math.inf:
            raise TraceError(f"{self.name}: no arrivals were recorded, so a rate above 0 is needed; it is {wanted}")
        rows = self._repeated(seed) if repeat else iter(self.rows(seed))
        if not self.recorded:
            count = limit if self.count is None or repeat else min(self.count, limit or self.count)
            return self._made(zip(drawn(wanted, self.cv, seed, count), rows, strict=False), 0.0, 1.0)
        stretch = 1.0 if rate is None else self._own_rate(limit, seed) / wanted
        first = next(rows)
        some = islice(chain([first], rows), limit)
        return self._made(((row.arrival, row) for row in some), first.arrival, stretch)

    def _own_rate(self, limit: int | None, seed: int) -> float:
        """Mean rate of the requests that will be drawn: those up to the limit."""
        assert self.rate is not None
        if limit is None or limit < 2 or (self.count is not None and limit >= self.count):
            return self.rate
        first = last = math.nan
        for place, row in enumerate(islice(self.rows(seed), limit)):
            last = row.arrival
            first = last if place == 0 else first
        return (limit - 1) / (last - first) if last > first else self.rate

    def _repeated(self, seed: int) -> Iterator[Row]:
        """Again and again, one mean interval after the last; ids of prefixes are renamed each time."""
        start, ids = 0.0, 0
        while True:
            top, end, first = -1, start, math.nan
            for place, row in enumerate(self.rows(seed)):
                first = row.arrival if place == 0 else first
                end = start + row.arrival - first
                top = max(top, max(row.prefix, default=-1))
                yield Row(end, row.prompt, row.output, tuple(one + ids for one in row.prefix) if ids else row.prefix)
            start, ids = end + (1 / self.rate if self.rate else 0.0), ids + top + 1

    def _made(self, rows: Iterable[tuple[float, Row]], first: float, stretch: float) -> Iterator[Request]:
        items = self.items
        for number, (arrival, row) in enumerate(rows):
            yield Request(
                number, (arrival - first) * stretch, row.prompt, row.output, prefix=row.prefix, block=BLOCK, items=items
            )

    def lengths(self, limit: int = 2000, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Prompt and output tokens of the first requests, for distributions."""
        rows = np.array([(row.prompt, row.output) for row in islice(self.rows(seed), limit)])
        return rows[:, 0], rows[:, 1]

    def describe(self) -> dict[str, Any]:
        """For a result's JSON."""
        return {
            "name": self.name, "requests": self.count, "rate": self.rate, "recorded_arrivals": self.recorded,
            "mean_prompt_tokens": self.mean_prompt, "mean_output_tokens": self.mean_output,
            "items": [item.kind for item in self.items], "fingerprint": self.fingerprint, "notes": list(self.notes),
        }  # fmt: skip

    @classmethod
    def synthetic(cls, isl: float, osl: float, **more: Any) -> Workload:
        """See `vllm_suite.planner.traces.synthetic.synthetic`."""
        from vllm_suite.planner.traces.synthetic import synthetic

        return synthetic(isl, osl, **more)
