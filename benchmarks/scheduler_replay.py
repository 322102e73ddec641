"""Length-aware scheduling against vLLM's own, on recorded requests: the real scheduler on a virtual clock, no model.

    python benchmarks/scheduler_replay.py --requests 2000 --seeds 6 --jobs 2 --json out.json --plot out.svg
    python benchmarks/scheduler_replay.py --trace F [F ...] --loads 0.9 1.1 --policies fcfs ours ours:kappa=0.05

Without `--trace` the cases of `replay_cases.py` are run. Each request ends by an EOS token at its recorded length,
which nothing that the scheduler sees contains; `oracle` alone is told. Constants are chosen on the first half of the
seeds, `--half report` shows the other. Every run is kept in a file under `build/replay`, and not run a second time.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import arguments, positive, show_table, write_result
from replay_cases import CASES, KV_BOUND, POLICIES, STEPS, Case, find_files, make_policy
from replay_report import FCFS, METRICS, against, draw, rows_of, summary
from replay_runs import Run, execute_all, with_requests
from replay_workload import Arrivals, Room, Source

from vllm_suite.fleet.traces import TraceError

ROOT = Path(__file__).resolve().parent.parent


def parser() -> argparse.ArgumentParser:
    parse = arguments(__doc__ or "")
    parse.add_argument("--trace", nargs="+", metavar="F", help="trace files, merged; default: the cases of the table")
    parse.add_argument("--case", nargs="+", metavar="NAME", help="of the table's cases only these")
    parse.add_argument("--requests", type=positive, default=2000, metavar="N", help="requests of a run")
    parse.add_argument("--seeds", type=positive, default=2, metavar="K", help="seeds 0 to K-1")
    parse.add_argument("--half", choices=("choose", "report", "both"), default="both", help="which half of the seeds")
    parse.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="P", help="ours:KEY=VALUE,...")
    parse.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="processes")
    parse.add_argument(
        "--runs", type=Path, default=ROOT / "build" / "replay", metavar="DIR", help="where runs are kept"
    )
    parse.add_argument("--plot", type=Path, metavar="FILE", help="draw the distributions of latency (.svg or .png)")
    of_trace = parse.add_argument_group("with --trace")
    of_trace.add_argument("--loads", nargs="+", type=float, default=[0.8, 1.0, 1.2], metavar="L")
    of_trace.add_argument("--rate", type=float, help="requests per second, in place of --loads")
    of_trace.add_argument("--arrivals", choices=("recorded", "poisson", "gamma"), help="default: recorded where it is")
    of_trace.add_argument("--cv", type=float, default=3.0, help="of the gaps, with --arrivals gamma")
    of_trace.add_argument("--blocks", type=positive, default=KV_BOUND.blocks, help="of 16 tokens of KV cache")
    of_trace.add_argument("--seqs", type=positive, default=KV_BOUND.seqs, help="max_num_seqs")
    of_trace.add_argument("--no-labels", action="store_true", help="take the classes away")
    of_trace.add_argument("--prefix-caching", action="store_true")
    of_trace.add_argument("--async-scheduling", action="store_true")
    return parse


def cases_of(args: argparse.Namespace, data: Path) -> list[Case]:
    """The cases that the command line asks for. Raises ValueError, TraceError, FileNotFoundError."""
    if not args.trace:
        names = [case.name for case in CASES]
        if unknown := sorted(set(args.case or ()) - set(names)):
            raise ValueError(f"no case {unknown[0]!r}; there are {', '.join(names)}")
        return [case for case in CASES if not args.case or case.name in args.case]
    paths = find_files(args.trace, data)
    kind = args.arrivals
    if kind is None:
        source = Source(paths)
        kind = "recorded" if source.rows and all(row.arrival_s is not None for row in source.rows) else "poisson"
    stem = "+".join(path.name.split(".")[0] for path in paths)
    loads = [(f"{stem}@{args.rate}rps", args.rate, None)] if args.rate else []
    loads = loads or [(f"{stem}@{load:g}", None, load) for load in args.loads]
    return [
        Case(
            name,
            tuple(str(path) for path in paths),
            Arrivals(kind, rate, load, args.cv if kind == "gamma" else 1.0),
            Room(args.blocks, args.seqs),
            labels=not args.no_labels,
            prefix_caching=args.prefix_caching,
            ahead=args.async_scheduling,
        )
        for name, rate, load in loads
    ]


def halves(seeds: int) -> dict[str, list[int]]:
    """Seeds on which constants are chosen, and seeds on which they are reported. One seed is for both."""
    middle = (seeds + 1) // 2
    return {"choose": list(range(middle)), "report": list(range(middle, seeds)) or [0]}


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    load = os.getloadavg()
    data = Path(os.environ.get("VLLM_SUITE_DATA") or ROOT.parent / "shared" / "data")
    requests = 200 if args.quick else args.requests
    by_half = halves(1 if args.quick else args.seeds)
    wanted = by_half if args.half == "both" else {args.half: by_half[args.half]}
    try:
        cases = cases_of(args, data)
        for policy in args.policies:
            make_policy(policy, cases[0].settings())
        for case in cases:
            find_files(case.files, data)
        runs = [
            run
            for case in cases
            for run in with_requests(
                case, requests, args.policies, sorted({s for half in wanted.values() for s in half})
            )
        ]
    except (ValueError, FileNotFoundError) as error:
        print(f"scheduler_replay: {error}", file=sys.stderr)
        return 2
    found: dict[str, dict[str, dict[int, Any]]] = {}
    try:
        for run, result in execute_all(runs, data, args.runs, args.jobs):
            found.setdefault(run.case.name, {}).setdefault(run.policy, {})[run.seed] = result
    except (TraceError, ValueError) as error:
        print(f"scheduler_replay: {error}", file=sys.stderr)
        return 2
    tables = {half: _half(cases, runs, found, seeds, half) for half, seeds in wanted.items()}
    if args.plot:
        held = by_half["report"] if "report" in wanted else by_half["choose"]
        kept = {case.name: {p: {s: found[case.name][p][s] for s in held} for p in args.policies} for case in cases}
        draw(args.plot, kept, f"{requests} requests a seed, seeds {held}; virtual clock, vLLM's scheduler")
        print(f"wrote {args.plot}")
    body = {
        "steps": asdict(STEPS),
        "cases": {case.name: {**asdict(case), "requests": case.requests or requests} for case in cases},
        "seeds": wanted,
        "metrics": list(METRICS),
        "results": tables,
    }
    write_result(args.json, "scheduler_replay", body, load)
    return 0


def _half(
    cases: list[Case], runs: list[Run], found: dict[str, dict[str, dict[int, Any]]], seeds: list[int], half: str
) -> dict[str, Any]:
    """Print one half's table, and give it as data."""
    order = list(dict.fromkeys(run.policy for run in runs))
    lines: list[list[str]] = []
    body: dict[str, Any] = {}
    for case in cases:
        kept = {policy: {seed: found[case.name][policy][seed] for seed in seeds} for policy in order}
        lines += rows_of(case, kept)
        body[case.name] = {
            policy: {
                "figures": summary(results),
                "against_fcfs": against(results, kept[FCFS]) if FCFS in kept and policy != FCFS else None,
            }
            for policy, results in kept.items()
        }
    purpose = "constants are chosen on them" if half == "choose" else "held out"
    show_table(f"seeds {seeds}: {purpose}", ["case", "policy", *METRICS], lines)
    return body


if __name__ == "__main__":
    raise SystemExit(main())
