"""What `vllm-suite plan` does: from arguments to a report, a fleet file and an exit status."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_suite import __version__
from vllm_suite.planner.plan import Plan, PlanError
from vllm_suite.planner.report.arguments import InputError
from vllm_suite.planner.report.fleet import fleet_of, fleet_text
from vllm_suite.planner.report.predicted import of_plan, of_study
from vllm_suite.planner.report.progress import Bar
from vllm_suite.planner.report.question import duration, question
from vllm_suite.planner.report.study import Study, as_json, study
from vllm_suite.planner.report.text import no_plan, report
from vllm_suite.planner.report.why import Impossible, impossible
from vllm_suite.planner.search.candidates import Candidate, candidates
from vllm_suite.planner.search.case import Case
from vllm_suite.planner.search.schemes import scheme_candidates
from vllm_suite.planner.search.search import Effort, Found, SearchResult, search
from vllm_suite.planner.search.space import Space, room
from vllm_suite.planner.search.state import State
from vllm_suite.planner.workload import Request


def plan(args: argparse.Namespace) -> int:
    """Find a plan, print the report, write what was asked for. Returns the exit status."""
    try:
        case = question(args)
        space = space_of(case)
        effort, deadline = timed(args)
        if args.method == "exhaustive":
            effort = replace(effort, patience=None, refine=None)
        sample = case.sample()
        listed, note = listing(case, space, sample, args.placement, args.processes)
        with State(args.state, case.key(space)) as state:
            result = found_by(args.method, case, space, listed, sample, effort, state)
        result.note = note
    except InputError.KINDS as error:
        print(f"vllm-suite plan: {error}", file=sys.stderr)
        return 2
    if result.best is None:
        why = impossible(case, space, listed, sample)
        sys.stdout.write(no_plan(case, result, why))
        _write_json(args.json, case, result, None, why)
        return 1
    found = study(case, result, sample, args.processes, deadline)
    text = report(case, result, found)
    sys.stdout.write(text)
    short = missed(case, result.best)
    if short:
        print(f"\n{short}")
    written = [args.json] if args.json is not None else []
    _write_json(args.json, case, result, found, None)
    try:
        if args.output is not None and not short:
            head = [f"Made by vllm-suite plan {__version__}: {result.best.plan.name} for {case.workload.name}",
                    f"{case.cluster.gpus} x {case.cluster.device.name}, step times: {case.source}"]  # fmt: skip
            spec = fleet_of(result.best.plan, case.setting, case.slo, model=case.name, longest=case.longest,
                            length_aware=case.dler, predicted=of_study(found, case))  # fmt: skip
            args.output.write_text(fleet_text(spec, head), encoding="utf-8")
            written.insert(0, args.output)
        written += pictured(args, case, result, found, sample, text, deadline)
    except InputError.KINDS as error:
        print(f"vllm-suite plan: {error}", file=sys.stderr)
        return 2
    if written:
        print(f"\nwrote {', '.join(map(str, written))}")
    if args.watch is not None or args.watch_file is not None:
        return _watch(args, case, result.best.plan)
    return 1 if short else 0


def pictured(
    args: argparse.Namespace,
    case: Case,
    result: SearchResult,
    found: Study,
    sample: list[Request],
    text: str,
    deadline: float | None,
) -> list[Path]:
    """Write the page and the timeline that were asked for; which they are. Raises PictureError, OSError."""
    if args.html is not None:
        from vllm_suite.planner.report.html import write_html

        write_html(args.html, case, result, found, sample, text, trace=args.timeline, deadline=deadline)
    elif args.timeline is not None:
        from vllm_suite.planner.report.html import write_timeline

        write_timeline(args.timeline, case, found.best.found.plan, found.rate, sample)
    return [path for path in (args.html, args.timeline) if path is not None]


FOR_SEARCH = 0.75
"""Share of a time limit that the search may take; the rest is for the report's simulations."""


def timed(args: argparse.Namespace) -> tuple[Effort, float | None]:
    """The effort of a search, and the time of `time.monotonic` at which everything is to be done."""
    seconds = duration("--time-limit", args.time_limit)
    if seconds is None:
        return Effort(processes=args.processes), None
    return Effort(processes=args.processes, seconds=FOR_SEARCH * seconds), time.monotonic() + seconds


def _watch(args: argparse.Namespace, case: Case, running: Plan) -> int:
    """Watch the fleet that runs a plan; a new one is written where the first one was."""
    from vllm_suite.planner.report.watching import watch_fleet

    effort, _ = timed(args)

    def again(now: Case) -> SearchResult:
        space, sample = space_of(now), now.sample()
        listed, _ = listing(now, space, sample, None, args.processes)
        with State(None, now.key(space)) as state:
            return found_by(args.method, now, space, listed, sample, effort, state)

    def write(new: Plan, now: Case) -> None:
        if args.output is None:
            return
        predicted = None if now.rate is None else of_plan(new, now.rate, now)
        spec = fleet_of(new, now.setting, now.slo, model=now.name, longest=now.longest, length_aware=now.dler,
                        predicted=predicted)  # fmt: skip
        head = [f"Made by vllm-suite plan {__version__}: {new.name} for {now.workload.name} at {now.rate:.4g}/s"]
        args.output.write_text(fleet_text(spec, head), encoding="utf-8")
        print(f"  wrote {args.output}")

    return watch_fleet(args, case, running, again, write)


def space_of(case: Case) -> Space:
    """The plans of a question: what fits beside the longest request, in cuts that the source knows."""
    prompt, both = case.lengths()

    def tokens(pool: Any, encoder: bool) -> int:
        limits = case.setting.limits(pool, encoder=encoder)
        return limits.blocks * limits.block_size

    holds = room(tokens, prompt, both)

    def fits(pool: Any, encoder: bool) -> bool:
        return holds(pool, encoder) and case.sources.knows(pool)

    return Space(case.model, case.cluster, case.choices, fits, bool(case.workload.items))


def listing(
    case: Case, space: Space, sample: list[Request], placement: str | None, processes: int | None
) -> tuple[list[Candidate], str]:
    """The candidates, APEX's, or DistServe's plan beside the colocated ones; and what is to be said of them.

    Raises:
        PlanError: there are none.
    """
    if case.choices.apex:
        if placement is not None:
            raise PlanError("--placement is for plans with prefill and decode; --space schemes=apex has none")
        return scheme_candidates(space, case.bounds(sample))
    try:
        listed = candidates(space, case.bounds(sample))
    except PlanError as error:
        reasons = "".join(f"\n  {reason}" for reason in list(case.sources.unknown)[:5])
        raise PlanError(f"{error}{reasons and f'; source {case.source} lacks:{reasons}'}") from error
    if placement is None:
        return listed, ""
    from vllm_suite.planner.search.placement import placed_by

    chosen = placed_by(placement, case, space, sample)
    return [chosen, *(each for each in listed if each.kind == "any")], ""


def found_by(
    method: str,
    case: Case,
    space: Space,
    listed: Sequence[Candidate],
    sample: list[Request],
    effort: Effort,
    state: State,
) -> SearchResult:
    """The search itself, with a progress bar."""
    evaluate, objective = case.evaluate(sample), case.objective()
    with Bar(len(listed)) as bar:
        if method == "optuna":
            from vllm_suite.planner.search.sampled import sampled

            return sampled(space, listed, evaluate, objective, effort=effort, seed=case.seed, progress=bar)
        return search(space, listed, evaluate, objective, effort=effort, state=state, progress=bar)


def missed(case: Case, best: Found) -> str:
    """What is short where a rate was asked for that the best plan does not hold; empty where it does."""
    if not case.asked or case.rate is None or math.isnan(best.goodput) or best.goodput >= case.rate:
        return ""
    return (f"The rate that was asked for, {case.rate:.4g} requests/s, is not met: the best plan holds"
            f" {best.goodput:.4g}, {best.goodput / case.rate:.0%} of it.")  # fmt: skip


def _write_json(
    path: Path | None, case: Case, result: SearchResult, found: Study | None, why: Impossible | None
) -> None:
    if path is None:
        return
    slo = case.slo
    data = {
        "version": __version__,
        "model": case.name,
        "hardware": {"device": case.cluster.device.name, "gpus": case.cluster.gpus},
        "workload": case.workload.describe(),
        "rate": case.rate,
        "slo": {"ttft": slo.ttft, "tpot": slo.tpot, "attainment": slo.attainment},
        "objective": case.goal,
        "source": {"asked": case.source, "names": case.sources.names},
        "met": found is not None and result.best is not None and not missed(case, result.best),
        "study": None if found is None else as_json(found, case),
        "impossible": None if why is None else why.as_json(),
        "search": {
            "plans": result.space, "bounded": result.bounded, "simulated": result.simulated, "runs": result.trials,
            "left": result.left, "stopped": result.stopped,
            "ranked": [{"plan": each.plan.name, "goodput": each.goodput, "level": each.candidate.level,
                        "bound": each.candidate.bound.rate} for each in result.ranked()],
        },
    }  # fmt: skip
    path.write_text(json.dumps(_finite(data), indent=1) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
