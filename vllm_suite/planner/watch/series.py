"""What a watch exports: the traffic that the plan is for beside that of now, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from vllm_suite.metrics.watch import PREFIX, WATCH
from vllm_suite.planner.watch.shift import Shift
from vllm_suite.planner.watch.window import Window


class WatchSeries:
    """The series of `vllm_suite.metrics.watch` in a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._made: dict[str, Any] = {}
        for spec in WATCH:
            kind = Counter if spec.kind == "counter" else Gauge
            made = self._made[spec.name] = kind(spec.name, spec.help, spec.labels, registry=registry)
            if spec.kind == "counter":
                # Rates have a first point then.
                for values in product(*(label.values for label in spec.labels)):
                    made.labels(*values)

    def looked(self, outcome: str) -> None:
        """A look was ok, or failed."""
        self._at("looks_total", outcome).inc()

    def saw(self, of: str, windows: Sequence[Window]) -> None:
        """Windows that the `plan` is for, or the last ones (`now`)."""
        whole = Window.joined(windows)
        self._at("requests_per_second", of).set(whole.rate)
        for what, histogram in (("prompts", whole.prompts), ("outputs", whole.outputs)):
            if math.isfinite(histogram.mean):
                self._at("mean_tokens", of, what).set(histogram.mean)

    def shifted(self, shifts: Iterable[Shift]) -> None:
        """A shift was confirmed."""
        for shift in shifts:
            self._at("shifts_total", shift.what).inc()

    def replanned(self, outcome: str, running: float = math.nan, best: float = math.nan) -> None:
        """What came of it, and the goodput of both plans where both were worked out."""
        self._at("replans_total", outcome).inc()
        for plan, goodput in (("running", running), ("best", best)):
            if math.isfinite(goodput):
                self._at("goodput_requests_per_second", plan).set(goodput)

    def _at(self, name: str, *labels: str) -> Any:
        return self._made[PREFIX + name].labels(*labels)
