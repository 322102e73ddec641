"""What a plan's fleet file says that requests will see, with the bounds that the source's error bar leaves."""

from __future__ import annotations

import math

from vllm_suite.fleet.predicted import PredictedSpec, PredictedTimes
from vllm_suite.planner.outcome import Outcome, Spread
from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.report.study import WIDEST, Study
from vllm_suite.planner.search.case import Case, What
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.workload import Request


def of_study(found: Study, case: Case) -> PredictedSpec | None:
    """Of the best plan, at the rate that the report is about; None where that was not simulated in time."""
    return spec_of(case, found.rate, found.error, found.best.outcome, found.quick, found.slow)


def of_plan(plan: Plan, rate: float, case: Case) -> PredictedSpec | None:
    """Of a plan without a report: three simulations. None where it cannot be served."""
    sample = case.sample()
    case.sources(plan.pools[-1])
    error = case.sources.uncertainty.relative
    width = min(error, WIDEST)
    own, quick, slow = (_outcome(case, What(plan, rate, scale=scale), sample) for scale in (1, 1 - width, 1 + width))
    return spec_of(case, rate, error, own, quick, slow)


def _outcome(case: Case, what: What, sample: list[Request]) -> Outcome | None:
    try:
        return case.outcome(what, sample)
    except (PlanError, SimulationError):
        return None


def spec_of(
    case: Case, rate: float, error: float, own: Outcome | None, quick: Outcome | None, slow: Outcome | None
) -> PredictedSpec | None:
    """The section of one simulation and those with quicker and slower steps.

    Where queues grow, times depend on how long one looks: None if they grow in `own`, no upper bounds if in `slow`.
    """
    if own is None or own.trend == "growing":
        return None
    high = None if slow is None or slow.trend == "growing" else slow
    times = {name: _times(*(None if each is None else getattr(each, name) for each in (own, quick, high)))
             for name in ("ttft", "tpot")}  # fmt: skip
    return PredictedSpec(rate=_four(rate), **times, error=_four(min(error, WIDEST)), source=case.source)


def _times(own: Spread | None, low: Spread | None, high: Spread | None) -> PredictedTimes | None:
    if own is None or not (own.p50 > 0 and own.p99 > 0):  # nan: no request has a second token
        return None
    times = {"p50": own.p50, "p99": own.p99}
    for name in ("p50", "p99"):
        value = times[name]
        # Quantiles are binned, so a bound may come out a trace on the wrong side.
        if low is not None and math.isfinite(getattr(low, name)):
            times[f"{name}_low"] = min(value, getattr(low, name))
        if high is not None and math.isfinite(getattr(high, name)):
            times[f"{name}_high"] = max(value, getattr(high, name))
    return PredictedTimes(**{name: _four(1000 * seconds) for name, seconds in times.items() if seconds > 0})


def _four(value: float) -> float:
    """Rounded to four figures: more are not known."""
    return float(f"{value:.4g}")
