"""Calibrate, predict a trace that was held out, run it on real engines, compare: all on two CPU cores.

    python benchmarks/planner_cpu.py --json out.json

A Llama of 91 M random weights in bfloat16, one engine a core, one thread each. The calibration measures steps of one
engine alone and of both at work, then what a served request sees beside its steps: in a fleet of two engines behind the
router, and in one of a prefill and a decode engine with NIXL between them. Each prediction is made before its run.
Lengths are those of the Azure conversation trace over `--shrink`, arrivals the recorded ones at another rate, chosen so
that the two engines would be busy for the shares of `--busy` as predicted. A logits processor ends each request by EOS
at its recorded length; router and scheduler are told one common `max_tokens`. Other work on the machine shows: the
benchmark wants both cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, positive, scratch, show_table, write_result
from planner_cpu_predict import Times, colocated, disaggregated

from vllm_suite.fleet.keeper import adopt_orphans
from vllm_suite.fleet.tiny import TinyConfig, make_tiny_model
from vllm_suite.fleet.traces import TraceError, load_trace
from vllm_suite.planner.calibrate.client import Ask, Client
from vllm_suite.planner.calibrate.file import Calibration
from vllm_suite.planner.calibrate.fleets import KINDS, SERVED, Kind, Running, running, spec
from vllm_suite.planner.calibrate.measure import Options, calibrate, show
from vllm_suite.planner.calibrate.probe import Probe, decode_seconds, prompt_seconds
from vllm_suite.planner.calibrate.serving import measure_fleet
from vllm_suite.planner.workload import Request

SHAPE = TinyConfig(
    layers=8, hidden_size=1024, intermediate_size=2816, heads=16, kv_heads=4, head_dim=64, max_position=4096,
    dtype="bfloat16",
)  # fmt: skip
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 512,
    "kv_cache_memory_bytes": 1 << 30,
}
MOST = 256
FIRST_TOKEN, TOKENS = 16, 480
ENV_LENGTHS = "PLANNER_CPU_LENGTHS"  # as `planner_eos` reads it, which imports vLLM
HERE = str(Path(__file__).resolve().parent)
END = ("--logits-processors", "planner_eos:EndAtLength", "--disable-uvicorn-access-log")
FIGURES = ("ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99")
TOLERANCE = {"mean": 0.10, "p99": 0.20}


def prompt_of(request: Request) -> tuple[int, ...]:
    """A prompt whose first two tokens name the request; the rest is drawn from them."""
    draw = random.Random(request.number)
    name = (FIRST_TOKEN + request.number // TOKENS, FIRST_TOKEN + request.number % TOKENS)
    return (*name, *draw.choices(range(FIRST_TOKEN, FIRST_TOKEN + TOKENS), k=request.prompt - 2))


def drawn(trace: Path | None, count: int, runs: int, shrink: int) -> list[list[Request]]:
    """Requests of each run with arrivals at one a second in the mean; numbers are unique over all runs.

    Raises:
        TraceError: the trace cannot be read or is too short.
    """
    rows = load_trace(trace, count * runs).requests
    if len(rows) < count * runs:
        raise TraceError(f"the trace has {len(rows)} requests, {count * runs} are needed")
    found = []
    for run in range(runs):
        part = rows[run * count : (run + 1) * count]
        begin, span = part[0].arrival_s, part[-1].arrival_s - part[0].arrival_s
        found.append(
            [
                Request(
                    run * count + index,
                    (row.arrival_s - begin) / span * (count - 1),
                    min(max(4, row.input_tokens // shrink), ENGINE["max_model_len"] - MOST - 64),
                    min(max(2, row.output_tokens // shrink), MOST - 8),
                )
                for index, row in enumerate(part)
            ]
        )
    return found


def at_rate(requests: Sequence[Request], rate: float) -> list[Request]:
    """The same with so many arrivals a second."""
    return [Request(each.number, each.arrival / rate, each.prompt, each.output) for each in requests]


def rate_for(calibration: Calibration, requests: Sequence[Request], busy: float, model: Path) -> float:
    """The rate at which the colocated engines would be busy for this share of the time, as predicted."""
    low, high = 0.05, 40.0
    for _ in range(12):
        middle = (low * high) ** 0.5
        found = colocated(calibration, at_rate(requests, middle), MOST, model)
        low, high = (middle, high) if sum(found.busy) / 2 < busy else (low, middle)
    return round((low * high) ** 0.5, 3)


async def run(fleet: Running, requests: Sequence[Request]) -> Times:
    """The real thing, as the client sees it."""
    asks = [Ask(prompt_of(each), MOST, each.arrival + 0.5, to_the_end=False) for each in requests]
    async with Client(fleet.url, SERVED) as client:
        answers = await client.send(asks)
    wrong = [each.number for each, got in zip(requests, answers, strict=True) if len(got.at) != each.output]
    if wrong:
        raise AssertionError(f"{len(wrong)} requests did not end at their recorded length, the first is {wrong[0]}")
    return Times(np.array([each.ttft for each in answers]), np.array([each.tpot for each in answers]))


async def serve_kind(
    kind: Kind, calibration: Calibration, fleet: Running, args: Any, loads: list[list[Request]], rates: list[float]
) -> tuple[Calibration, list[dict[str, Any]]]:
    """Constants of this fleet, then each load: predicted, and run."""
    both = kind == "colocated"
    repeats = 3 if args.quick else args.repeats
    calibration = await measure_fleet(fleet, kind, calibration, width=2 if both else 1, repeats=repeats, say=say)
    if not rates:
        rates += [rate_for(calibration, load, busy, args.model) for load, busy in zip(loads, args.busy, strict=True)]
        say(f"rates {rates}")
    runs = []
    for load, rate in zip(loads, rates, strict=True):
        requests = at_rate(load, rate)
        if both:
            predicted = colocated(calibration, requests, MOST, args.model)
        else:
            predicted = disaggregated(calibration, requests, args.model)
        begun, before = time.monotonic(), os.getloadavg()
        measured = await run(fleet, requests)
        say(f"{kind} at {rate:g}/s: {time.monotonic() - begun:.0f} s")
        runs.append({"rate": rate, "predicted": predicted, "measured": measured, "load_before": before})
    return calibration, runs


def say(text: str) -> None:
    """One line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def compared(facts: dict[str, Any], slo: tuple[float, float]) -> list[dict[str, Any]]:
    """Predicted beside measured for every load and plan."""
    rows = []
    for kind in KINDS:
        for each in facts[kind]:
            ours, real = each["predicted"].figures(slo), each["measured"].figures(slo)
            errors = {name: ours[name] / real[name] - 1 for name in FIGURES}
            within = {name: abs(errors[name]) <= TOLERANCE[name.split("_")[1]] for name in FIGURES}
            rows.append(
                {"plan": kind, "rate": each["rate"], "predicted": ours, "measured": real, "errors": errors,
                 "within": within, "busy_predicted": each["predicted"].busy, "outside": each["predicted"].outside,
                 "load_before": each["load_before"]}
            )  # fmt: skip
    return rows


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Which plan is better at each rate, by each figure, predicted and measured."""
    found = []
    for one in (row for row in rows if row["plan"] == KINDS[0]):
        other = next(row for row in rows if row["plan"] == KINDS[1] and row["rate"] == one["rate"])
        for name in (*FIGURES, "attainment"):
            sign = -1 if name == "attainment" else 1
            better = {
                side: KINDS[0] if sign * one[side][name] <= sign * other[side][name] else KINDS[1]
                for side in ("predicted", "measured")
            }
            found.append({"rate": one["rate"], "by": name, **better, "same": better["predicted"] == better["measured"]})
    return found


async def measure(
    args: Any, calibration: Calibration, loads: list[list[Request]], folder: Path, lengths: str
) -> tuple[Calibration, dict[str, list[dict[str, Any]]]]:
    """Both fleets, one after the other. `lengths` is the file from which the engines know where answers end."""
    facts: dict[str, list[dict[str, Any]]] = {}
    rates: list[float] = list(args.rates or [])
    for kind in KINDS:
        say(f"starting the {kind} fleet")
        env = {"PYTHONPATH": HERE, ENV_LENGTHS: lengths}
        file = spec(kind, str(args.model), ENGINE, folder, device="cpu", args=END, env=env)
        async with running(file) as fleet:
            calibration, facts[kind] = await serve_kind(kind, calibration, fleet, args, loads, rates)
    return calibration, facts


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="default: the Azure conversation trace")
    parser.add_argument("--requests", type=positive, default=180, metavar="N", help="of each run")
    parser.add_argument("--shrink", type=positive, default=5, help="lengths of the trace are divided by this")
    parser.add_argument("--busy", type=float, nargs="+", default=[0.4, 0.6, 0.75], help="shares, one run each")
    parser.add_argument("--rates", type=float, nargs="+", help="requests a second in place of --busy")
    parser.add_argument("--seconds", type=float, default=150.0, help="of the grid, alone and again with both at work")
    parser.add_argument("--repeats", type=positive, default=10, help="of each measurement of a fleet's constants")
    parser.add_argument("--dense", type=float, default=1.0, help="grid points per factor of two")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="write it here; read it where it exists")
    parser.add_argument("--folder", type=Path, help="model and logs; a temporary one by default")
    args = parser.parse_args(argv)
    before = os.getloadavg()
    requests, args.busy = (12, args.busy[:1]) if args.quick else (args.requests, args.busy)
    try:
        loads = drawn(args.trace, requests, len(args.rates or args.busy), args.shrink)
    except TraceError as error:
        print(f"planner_cpu: {error}", file=sys.stderr)
        return 2
    adopt_orphans()
    with scratch("planner-cpu-") as temporary:
        folder = args.folder or temporary
        folder.mkdir(parents=True, exist_ok=True)
        args.model = make_tiny_model(folder / "model", SHAPE)
        if args.calibration is not None and args.calibration.exists():
            from vllm_suite.planner.calibrate.file import load

            calibration = load(args.calibration)
        else:
            options = Options(
                model=str(args.model), device="cpu", engine=ENGINE, engines=2, seconds=args.seconds, dense=args.dense,
                folder=folder / "calibrate",
            )  # fmt: skip
            calibration = calibrate(options, say)
            if args.calibration is not None:
                calibration.save(args.calibration)
        names = folder / "lengths.json"
        names.write_text(json.dumps([[*prompt_of(each)[:2], each.output] for load in loads for each in load]))
        calibration, facts = asyncio.run(measure(args, calibration, loads, folder, os.path.abspath(names)))
    alone = calibration.alone.step.model()
    lengths = [each.prompt for load in loads for each in load]
    prompt_s = prompt_seconds(alone, round(sum(lengths) / len(lengths)), ENGINE["max_num_batched_tokens"])[0]
    token_s = decode_seconds(alone, Probe((), (), 1, 0, range(0)), 1)
    slo = (3 * prompt_s, 2 * token_s)
    rows = compared(facts, slo)
    best = winners(rows)
    print(show(calibration))
    show_table(
        f"predicted / measured, error; targets {slo[0] * 1e3:.0f} ms and {slo[1] * 1e3:.0f} ms",
        ["plan", "rate", *FIGURES, "attainment"],
        [
            [row["plan"], f"{row['rate']:g}"]
            + [
                f"{row['predicted'][n] * 1e3:.1f} / {row['measured'][n] * 1e3:.1f} ({row['errors'][n]:+.1%})"
                for n in FIGURES
            ]
            + [f"{row['predicted']['attainment']:.2f} / {row['measured']['attainment']:.2f}"]
            for row in rows
        ],
    )
    for each in best:
        print(f"rate {each['rate']:g}, by {each['by']}: predicted {each['predicted']}, measured {each['measured']}")
    each_request = {
        kind: [
            {"rate": one["rate"]}
            | {f"{side}_{name}": [round(float(v), 6) for v in getattr(one[side], name)]
               for side in ("predicted", "measured") for name in ("ttft", "tpot")}
            for one in facts[kind]
        ]
        for kind in KINDS
    }  # fmt: skip
    body = {
        "slo_s": slo, "shrink": args.shrink, "max_tokens": MOST, "engine": ENGINE, "rows": rows, "winners": best,
        "requests": [[(x.number, x.prompt, x.output, round(x.arrival, 4)) for x in load] for load in loads],
        "each": each_request, "calibration": calibration.model_dump(mode="json"),
    }  # fmt: skip
    write_result(args.json, "planner_cpu", body, before)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
