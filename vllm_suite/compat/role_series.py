"""What an instance exports of its switches."""

from __future__ import annotations

import functools
from typing import Any

from vllm_suite.metrics import ROLES as SPECS
from vllm_suite.roles.instance import Report


def observe(report: Report) -> None:
    """Count an attempt that has ended."""
    series = _made()
    outcome = report.outcome or "out"
    series["vllm_suite_role_switches_total"].labels(report.source, report.target, outcome).inc()
    for phase, seconds in report.seconds.items():
        series["vllm_suite_role_phase_seconds"].labels(phase).observe(seconds)
    for stage, count in (report.given_back or {}).items():
        series["vllm_suite_role_given_back_total"].labels(stage).inc(count)


@functools.cache
def _made() -> dict[str, Any]:
    from prometheus_client import Counter, Histogram

    made: dict[str, Any] = {}
    for spec in SPECS:
        if spec.kind == "counter":
            made[spec.name] = Counter(spec.name, spec.help, spec.labels)
        elif spec.kind == "histogram":
            made[spec.name] = Histogram(spec.name, spec.help, spec.labels, buckets=spec.buckets)
    return made
