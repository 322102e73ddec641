"""Roles that follow the load beside fixed ones, on real CPU engines under a load whose mix flips.

Three instances of role `any` and the router, started once. Two prefill and one decodes, as suits the first mix (long
prompts, short answers). Then the mix flips to short prompts and long answers, at a rate that one decoding instance
cannot hold and two can: `--load` times the measured capacity of one. What is measured differs between runs on the same
machine; `--rate` and `--first-rate` fix the rates, so that runs can be compared. The same arrivals are sent to the
fleet with fixed roles and to the fleet with the controller, in turn. Every answer is compared with the one that its
prompt gets alone.

Reported: TTFT, time per token and latency by phase, over all of it and over its last third, in which the roles have
followed; the target (`--slack` times what a request takes alone); the ratio of latencies, fixed over switching; the
controller's switches; and the seconds of switches on the idle fleet, each phase of them.

    python benchmarks/bench_roles.py --json benchmarks/results/roles.cpu-2core.json
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from common import arguments, positive, scratch, show_table, spread, write_result

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "fleet"))

from flip import (
    DECODE,
    FIXED,
    NAMES,
    PREFILL,
    Answer,
    Controlled,
    Mix,
    Run,
    alone,
    arrange,
    capacity,
    flip_spec,
    load,
    roles_now,
    switch,
)
from harness import Fleet, running

from vllm_suite.fleet.tiny import make_tiny_model


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--repeats", type=positive, default=3, help="pairs of runs (3)")
    parser.add_argument("--prefills", type=positive, default=60, metavar="N", help="requests of the first mix (60)")
    parser.add_argument("--decodes", type=positive, default=300, metavar="N", help="requests of the second mix (300)")
    parser.add_argument(
        "--load", type=float, default=1.35, metavar="X", help="of the capacity of one that decodes (1.35)"
    )
    parser.add_argument("--rate", type=rate, metavar="REQ_PER_S", help="of the second mix; --load is then not used")
    parser.add_argument("--first-rate", type=rate, metavar="REQ_PER_S", help="of the first mix, likewise")
    parser.add_argument("--slack", type=float, default=5.0, metavar="X", help="target: times a request alone (5)")
    parser.add_argument("--switches", type=positive, default=10, metavar="N", help="on the idle fleet (10)")
    parser.add_argument("--rule", choices=("epd", "goodput"), default="epd", help="of the controller (epd)")
    parser.add_argument(
        "--source", default="roofline", help="of rule goodput: roofline, or calibrated=FILE of `vllm-suite calibrate`"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (0)")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.prefills, args.decodes, args.switches = 1, 15, 60, 2
    before = os.getloadavg()
    with scratch("bench-roles-") as folder:
        result = asyncio.run(measure(args, folder))
    report(result)
    write_result(args.json, "roles", result, before)
    return 1 if result["wrong"] or result["lost"] else 0


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of it, on one fleet."""
    import aiohttp

    model = make_tiny_model(folder / "model")
    roles: dict[str, Any] = {"every": 0.5, "agree": 2, "hold": 5, "least_queue": 3, "rule": args.rule}
    if args.rule == "goodput":
        roles["predict"] = {"hardware": "3xCPU-2CORE", "source": args.source, "window": 10, "horizon": 60}
    wanted = flip_spec(model, folder / "logs", roles)
    runs: dict[str, list[Run]] = {"fixed": [], "switching": []}
    with running(folder, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, folder / "logs", session)
            await arrange(fleet, FIXED)
            idle = await switches(fleet, args.switches)
            await arrange(fleet, FIXED)
            expected = await alone(fleet, (PREFILL, DECODE))
            measured = {mix.name: await capacity(fleet, mix, 12) for mix in (PREFILL, DECODE)}
            fixed = {PREFILL.name: args.first_rate, DECODE.name: args.rate}
            rates = rates_of(measured, args.load, fixed)
            phases = [(PREFILL, rates[PREFILL.name], args.prefills), (DECODE, rates[DECODE.name], args.decodes)]
            ended = []
            for repeat in range(args.repeats):
                for kind in ("fixed", "switching"):
                    await arrange(fleet, FIXED)
                    if kind == "fixed":
                        run = await load(fleet, phases, expected, args.seed + repeat)
                    else:
                        async with Controlled(fleet, wanted) as controlled:
                            run = await load(fleet, phases, expected, args.seed + repeat)
                        run.moves = controlled.moves
                        ended.append(await roles_now(fleet))
                    runs[kind].append(run)
                    print(f"{kind} {repeat + 1}: {len(run.answers)} answers, switches asked for: {len(run.moves)}")
    every = [answer for kind in runs.values() for run in kind for answer in run.answers]
    found = {kind: [figures(run, expected, args.slack) for run in found] for kind, found in runs.items()}
    return {
        "argv": sys.argv[1:],
        "rule": args.rule,
        "rates": rates,
        "rates_fixed": fixed,
        "capacity": measured,
        "mixes": {mix.name: {"prompt": mix.prompt, "output": mix.output} for mix in (PREFILL, DECODE)},
        "lost": [answer.error for answer in every if answer.error],
        "wrong": sum(not answer.right and answer.error is None for answer in every),
        "requests": len(every),
        "runs": found,
        "moves": [run.moves for run in runs["switching"]],
        "roles_at_the_end": ended,
        "ratio": ratios(found),
        "idle_switches": idle,
    }


def rate(text: str) -> float:
    """Argument type: requests a second."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of requests a second above 0")
    return value


def rates_of(measured: dict[str, float], load: float, fixed: dict[str, float | None]) -> dict[str, float]:
    """Requests a second of each mix: the fixed ones, else `load` times what the instances held, half for the first.

    Both instances prefill: the first mix is held by these, and would not be by one.
    """
    share = {PREFILL.name: load / 2, DECODE.name: load}
    return {name: fixed[name] or share[name] * held for name, held in measured.items()}


async def switches(fleet: Fleet, count: int) -> dict[str, Any]:
    """An instance to decode and back, with nothing to drain: seconds, in all and by phase."""
    reports = [await switch(fleet, NAMES[0], ("decode", "prefill")[turn % 2]) for turn in range(2 * count)]
    phases = {phase: spread([report["seconds"][phase] for report in reports]) for phase in reports[0]["seconds"]}
    beside = [sum(took for phase, took in report["seconds"].items() if phase != "closing") for report in reports]
    return {"phases": phases, "beside_draining_s": spread(beside)}


def figures(run: Run, expected: dict[tuple[str, int], Any], slack: float) -> dict[str, Any]:
    """Of each mix: the whole phase, and its last third."""
    return {mix.name: _of(mix, run.of(mix), expected, slack) for mix in (PREFILL, DECODE)}


def _of(mix: Mix, answers: list[Answer], expected: dict[tuple[str, int], Any], slack: float) -> dict[str, Any]:
    single = [found for (name, _), found in expected.items() if name == mix.name]
    target = {
        "ttft_s": slack * statistics.median(ttft for _, ttft, _ in single),
        "latency_s": slack * statistics.median(latency for _, _, latency in single),
    }
    answers = sorted((answer for answer in answers if answer.error is None), key=lambda answer: answer.arrived)
    last = answers[2 * len(answers) // 3 :]
    return {"target": target, "all": _numbers(mix, answers, target), "last_third": _numbers(mix, last, target)}


def _numbers(mix: Mix, answers: list[Answer], target: dict[str, float]) -> dict[str, Any]:
    if not answers:
        return {"requests": 0}
    values = {
        "ttft_s": [answer.ttft for answer in answers],
        "tpot_s": [(answer.latency - answer.ttft) / max(1, mix.output - 1) for answer in answers],
        "latency_s": [answer.latency for answer in answers],
    }
    found: dict[str, Any] = {"requests": len(answers)}
    for name, each in values.items():
        ordered = sorted(each)
        found[name] = {
            "mean": statistics.fmean(each),
            "p50": ordered[len(ordered) // 2],
            "p99": ordered[min(len(ordered) - 1, math.ceil(0.99 * len(ordered)) - 1)],
        }
    found["p99_inside"] = {name: found[name]["p99"] <= limit for name, limit in target.items()}
    return found


def ratios(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Fixed over switching, of the runs with the same arrivals: above 1, switching is faster."""
    return {
        mix.name: {
            part: {
                f"{name}_{value}": spread(
                    [
                        fixed[mix.name][part][name][value] / moved[mix.name][part][name][value]
                        for fixed, moved in zip(found["fixed"], found["switching"], strict=True)
                    ]
                )
                for name in ("ttft_s", "latency_s")
                for value in ("mean", "p99")
            }
            for part in ("all", "last_third")
        }
        for mix in (PREFILL, DECODE)
    }


def report(result: dict[str, Any]) -> None:
    """Tables on the terminal."""
    rows = []
    for mix in (PREFILL, DECODE):
        for part in ("all", "last_third"):
            for kind, runs in result["runs"].items():
                each = [run[mix.name][part] for run in runs if run[mix.name][part]["requests"]]
                cells = [
                    f"{1000 * statistics.median(one[name][value] for one in each):.0f}"
                    for name in ("ttft_s", "latency_s")
                    for value in ("mean", "p99")
                ]
                inside = sum(all(one["p99_inside"].values()) for one in each)
                rows.append([f"{mix.name}, {part}", kind, *cells, f"{inside} of {len(each)}"])
    columns = ["phase", "roles", "TTFT ms", "P99", "latency ms", "P99", "P99 inside target"]
    show_table("medians over runs", columns, rows)
    ratio = result["ratio"][DECODE.name]["all"]["latency_s_mean"]["median"]
    print(f"\nflipped load: mean latency with fixed roles is {ratio:.2f} times that with switching")
    beside = result["idle_switches"]["beside_draining_s"]
    print(f"a switch beside draining: {beside['median']:.3f} s, at most {beside['max']:.3f} s of {beside['samples']}")
    for name, came in result["rates"].items():
        how = "fixed" if result["rates_fixed"][name] else "measured"
        print(f"{name}: {came:.2f} requests a second ({how}); 12 at once were served at {result['capacity'][name]:.2f}")
    print(f"requests {result['requests']}, lost {len(result['lost'])}, wrong {result['wrong']}")


if __name__ == "__main__":
    raise SystemExit(main())
