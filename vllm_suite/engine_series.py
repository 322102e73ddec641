"""The Prometheus series of one connector, made inside an engine with the metric classes that vLLM hands out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from vllm_suite.metrics import SeriesSpec

# Peers beyond this many share one label value.
MAX_PEERS = 1024
_LONGEST_LABEL = 128

_made: dict[str, Any] = {}


class MetricClasses(NamedTuple):
    """vLLM's: Prometheus's own, or stand-ins of the same signature."""

    counter: Any
    gauge: Any
    histogram: Any


class EngineSeries:
    """Series by name, with the labels of each engine of this process in front of their own.

    Args:
        specs: rows of :mod:`vllm_suite.metrics`.
        labelnames, per_engine: names of the engines' labels, and their values by engine index.
    """

    def __init__(
        self,
        specs: Iterable[SeriesSpec],
        classes: MetricClasses,
        labelnames: Sequence[str],
        per_engine: Mapping[int, Sequence[object]],
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._per_engine = per_engine
        self._peers: set[str] = set()
        self._series = {name: _make(spec, classes, labelnames) for name, spec in self.specs.items()}

    def start_at_zero(self, names: Iterable[str]) -> None:
        """Export these series from now on, with every value of their labels, which have closed sets of them.

        Rates then have a first point: of a counter that appears with its first count Prometheus sees no increase.
        """
        for name in names:
            sets = [label.values for label in self.specs[name].labels]
            for engine_idx, values in product(self._per_engine, product(*sets)):
                self.child(name, engine_idx, *values)

    def child(self, name: str, engine_idx: int, *values: object) -> Any:
        """The series of one engine with these label values."""
        return self._series[name].labels(*self._per_engine[engine_idx], *values)

    def peer(self, value: str) -> str:
        """Label value of a peer: of bounded length, and one of a bounded number."""
        if value not in self._peers:
            if len(self._peers) >= MAX_PEERS:
                return "other"
            self._peers.add(value)
        return value[:_LONGEST_LABEL]

    def labels(self, name: str, value: str) -> tuple[str, ...]:
        """Label values for a series of at most one label."""
        labels = self.specs[name].labels
        if not labels:
            return ()
        return (self.peer(value) if labels == ("peer",) else value[:_LONGEST_LABEL],)


def _make(spec: SeriesSpec, classes: MetricClasses, labelnames: Sequence[str]) -> Any:
    from prometheus_client import REGISTRY

    if (old := _made.pop(spec.name, None)) is not None:
        # Another engine was built in this process before. vLLM drops only its own series then.
        with contextlib.suppress(KeyError):
            REGISTRY.unregister(old)
    options: dict[str, Any] = {}
    if spec.kind == "gauge":
        options["multiprocess_mode"] = "mostrecent"
    elif spec.kind == "histogram":
        options["buckets"] = list(spec.buckets)
    new = getattr(classes, spec.kind)
    made = new(name=spec.name, documentation=spec.help, labelnames=[*labelnames, *spec.labels], **options)
    _made[spec.name] = made
    return made
