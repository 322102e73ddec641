"""`vllm-suite plan --watch`: the search as what a watch asks, and the fleet file as what it writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

from prometheus_client import CollectorRegistry, start_http_server

from vllm_suite.planner.evaluate import goodput
from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.report.arguments import InputError
from vllm_suite.planner.report.question import duration
from vllm_suite.planner.search.case import Case
from vllm_suite.planner.search.search import SearchResult
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.traces import Workload
from vllm_suite.planner.watch import Prometheus, Recorded, Settings, WatchError, WatchSeries, watch

Search = Callable[[Case], SearchResult]


Write = Callable[[Plan, Case], object]
"""Writes the fleet file of a plan."""


class Searched:
    """A watch's `Planner`: the same question with the traffic of now.

    Args:
        search: finds the plans of a case.
    """

    def __init__(self, case: Case, search: Search) -> None:
        self.case, self.search = case, search

    def of(self, workload: Workload) -> Case:
        """The question for some traffic."""
        return replace(self.case, workload=workload, rate=workload.rate, asked=True)

    def best(self, workload: Workload) -> Plan | None:
        """See `Planner`."""
        best = self.search(self.of(workload)).best
        return None if best is None else best.plan

    def goodput(self, plan: Plan, workload: Workload) -> float:
        """See `Planner`; by the bisection of `evaluate.goodput`."""
        case = self.case
        try:
            found = goodput(plan, case.setting, workload, case.slo, requests=case.requests,
                            start=workload.rate, seed=case.seed)  # fmt: skip
        except (PlanError, SimulationError):
            return 0.0
        return found.rate


def watch_fleet(args: argparse.Namespace, case: Case, plan: Plan, search: Search, write: Write) -> int:
    """Watch until interrupted, or for `--watch-looks`. Returns the exit status.

    Args:
        plan: that is running.
        search: finds the plans of a case.
        write: called with each new plan and the case it is for.
    """
    if case.workload.items:
        print("vllm-suite plan: a server's metrics do not say what items requests have; watch without --images",
              file=sys.stderr)  # fmt: skip
        return 2
    planner, registry = Searched(case, search), CollectorRegistry()
    try:
        step = duration("--watch-window", args.watch_window) or 60.0
        source = (
            Recorded(args.watch_file)
            if args.watch_file is not None
            else Prometheus(args.watch, args.watch_selector, step=step, lag=step / 4)
        )
        if args.watch_metrics_port is not None:
            _serve(args.watch_metrics_host, args.watch_metrics_port, registry)
        watch(
            source,
            plan,
            planner,
            settings=Settings(every=step),
            series=WatchSeries(registry),
            changed=lambda new, workload: write(new, planner.of(workload)),
            record=args.watch_record,
            looks=args.watch_looks,
        )
    except (WatchError, InputError, OSError) as error:
        print(f"vllm-suite plan: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


def _serve(host: str, port: int, registry: CollectorRegistry) -> None:
    try:
        start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise InputError(f"--watch-metrics-port: series cannot be served at {host}:{port}: {error}") from None
