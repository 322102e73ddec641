"""The report of a search with its pictures, in one file."""

from __future__ import annotations

import time
from pathlib import Path

from vllm_suite.planner.observing import Both
from vllm_suite.planner.outcome import Collector
from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.report import pictures
from vllm_suite.planner.report.page import Section, page
from vllm_suite.planner.report.series import PoolSeries
from vllm_suite.planner.report.study import Study
from vllm_suite.planner.search.case import Case, What
from vllm_suite.planner.search.search import SearchResult
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.timeline import Timeline
from vllm_suite.planner.workload import Request

RATES = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.15, 1.3)
"""Of the best plan's highest rate, at which attainment is drawn."""


def write_html(
    path: Path,
    case: Case,
    result: SearchResult,
    found: Study,
    sample: list[Request],
    text: str,
    *,
    trace: Path | None = None,
    deadline: float | None = None,
) -> None:
    """Write the page.

    Args:
        text: the report as it is printed.
        trace: also a Chrome trace of the best plan's run.
        deadline: of `time.monotonic`; no simulation is begun after it, and what lacks one says so.

    Raises:
        PictureError: matplotlib is missing. OSError: the file cannot be written.
    """
    plans: dict[str, Plan] = {found.best.found.plan.name: found.best.found.plan}
    for other in (found.colocated, found.disaggregated):
        if other is not None:
            plans.setdefault(other.found.plan.name, other.found.plan)
    collectors, series = {}, None
    for name, plan in plans.items():
        if series is not None and over(deadline):
            break
        collector, own, timeline = _run(case, plan, found.rate, sample)
        collectors[name] = collector
        if series is None:
            series = own
            if trace is not None:
                timeline.write(trace)
    assert series is not None
    best = found.best.found
    curves = {name: _curve(case, plan, best.goodput, sample, deadline) for name, plan in plans.items()}
    said = (f"Latency at {found.rate:.4g} requests/s. No plan beats the named ones in rate, latency and energy; J is"
            " energy for each token.")  # fmt: skip
    sections = [
        Section("Report", text=text),
        Section("Plans", svg=pictures.svg(pictures.pareto(_marks(result, found), "goodput (requests/s)",
                "mean latency (s)")), caption=said),
        Section("Share of requests within the targets", svg=pictures.svg(pictures.attainment(
                {name: curve for name, curve in curves.items() if curve}, case.slo.attainment)),
                caption=f"Bands are 95 % intervals.{_cut(deadline)}"),
        Section("Times of requests", svg=pictures.svg(pictures.distributions(collectors, case.slo)),
                caption=f"At {found.rate:.4g} requests/s."),
        Section("Pools over time", svg=pictures.svg(pictures.pools(series)),
                caption=f"{best.plan.name} at {found.rate:.4g} requests/s."),
    ]  # fmt: skip
    path.write_text(
        page(f"{case.name} on {case.cluster.gpus} x {case.cluster.device.name}", sections), encoding="utf-8"
    )


def write_timeline(path: Path, case: Case, plan: Plan, rate: float, sample: list[Request]) -> None:
    """A Chrome trace of a plan's run, without pictures. Raises OSError: the file cannot be written."""
    _run(case, plan, rate, sample)[2].write(path)


def _run(case: Case, plan: Plan, rate: float, sample: list[Request]) -> tuple[Collector, PoolSeries, Timeline]:
    setting, workload, simulated = case.varied(What(plan, rate), sample)
    requests = simulated.requests(rate)
    setting = setting.settled(plan, lambda: requests)
    collector = Collector(case.slo, stationary=not workload.recorded)
    series, timeline = PoolSeries(plan), Timeline(plan)

    def sink(served: Served) -> None:
        collector(served)
        timeline.served(served)

    simulate_plan(plan, setting, requests, sink, observer=Both(series, timeline))
    return collector, series, timeline


def _marks(result: SearchResult, found: Study) -> list[pictures.Mark]:
    front = {each.found.plan for each in found.front}
    latency = {each.plan: each.at_rate.latency for each in result.ranked() if each.at_rate is not None}
    compared = [each for each in (found.best, found.colocated, found.disaggregated, *found.front) if each is not None]
    latency |= {each.found.plan: each.outcome.latency.mean for each in compared if each.outcome is not None}
    joules = {each.found.plan: f" ({each.outcome.joules_per_token:.3g} J)" for each in found.front
              if each.outcome is not None and each.outcome.joules_per_token is not None}  # fmt: skip
    return [
        pictures.Mark(each.plan.name + joules.get(each.plan, ""), each.goodput, latency[each.plan], each.plan in front)
        for each in result.ranked()
        if each.plan in latency and each.goodput == each.goodput
    ]


def over(deadline: float | None) -> bool:
    """Whether a deadline of `time.monotonic` has passed."""
    return deadline is not None and time.monotonic() >= deadline


def _cut(deadline: float | None) -> str:
    return " The time was over before every rate was simulated." if over(deadline) else ""


def _curve(
    case: Case, plan: Plan, highest: float, sample: list[Request], deadline: float | None
) -> list[pictures.Step]:
    steps = []
    for factor in RATES:
        if over(deadline):
            break
        try:
            outcome = case.outcome(What(plan, factor * highest), sample)
        except (SimulationError, PlanError):
            continue
        steps.append(pictures.Step(factor * highest, outcome.attainment, outcome.low, outcome.high))
    return steps
