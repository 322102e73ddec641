"""The planner's simulator: requests per second of one core, and memory, over rates and lengths of the trace.

Requests of 500 prompt and 200 output tokens with Poisson arrivals, on one engine of Llama-3.1-8B on an H100 by the
`roofline`, or on a fleet of two prefill and one decode instance (`prefill-decode`). CPU time of this process, the
median over repetitions; `peak` is what Python allocated at most, in a run of its own, with a tenth of the requests and
with all of them.

    python benchmarks/bench_planner_simulator.py [--requests N] [--rates R ...] [--modes MODE ...] [--json FILE]
"""

from __future__ import annotations

import os
import random
import statistics
import time
import tracemalloc
from collections.abc import Iterator
from itertools import product
from typing import Any

from common import arguments, positive, show_table, write_result

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Parallel, load
from vllm_suite.planner.models.memory import kv_capacity
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.simulator.results import Summary
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.roofline import RooflineSource
from vllm_suite.planner.workload import Request

MODEL, HARDWARE = "meta-llama/Llama-3.1-8B", "1xH100-SXM"
PROMPT, OUTPUT = 500, 200


# Pipeline stages, ids of prompts' first half, settings.
MODES: dict[str, tuple[int, int, dict[str, bool]]] = {
    "in-turn": (1, 0, {}),
    "ahead": (1, 0, {"async_scheduling": True}),
    "caching": (1, 0, {"async_scheduling": True, "prefix_caching": True}),
    "prefixes": (1, 50, {"async_scheduling": True, "prefix_caching": True}),
    "stages": (2, 0, {}),
    "stages-ahead": (2, 0, {"async_scheduling": True}),
}


def trace(count: int, rate: float, ids: int = 0) -> Iterator[Job]:
    """Poisson arrivals, the same in every run."""
    draw, now = random.Random(0), 0.0
    for number in range(count):
        now += draw.expovariate(rate)
        yield Job(number, now, PROMPT, OUTPUT, prefix=(number % ids,) if ids else (), block=256)


FLEET = Plan((PoolPlan("prefill", 2), PoolPlan("decode", 1)))


def requests_of(jobs: Iterator[Job]) -> Iterator[Request]:
    """The same for a fleet."""
    return (Request(job.number, job.arrival, job.prompt, job.output) for job in jobs)


def main() -> None:
    parse = arguments(__doc__ or "")
    parse.add_argument("--requests", type=positive, default=20_000, metavar="N", help="requests of a run")
    parse.add_argument("--rates", type=float, nargs="+", default=[5.0, 20.0, 35.0, 45.0], help="requests per second")
    parse.add_argument(
        "--modes", nargs="+", choices=[*MODES, "prefill-decode"], default=["in-turn"], help="of scheduling"
    )
    parse.add_argument("--repeat", type=positive, default=3, metavar="K", help="repetitions")
    args = parse.parse_args()
    requests, repeat = (2000, 1) if args.quick else (args.requests, args.repeat)
    load_before = os.getloadavg()
    model, quant = load(MODEL)
    machine = cluster(HARDWARE.replace("1x", "2x"))
    sources = {stages: RooflineSource(model, quant, Parallel(pp=stages), machine) for stages in (1, 2)}
    blocks = kv_capacity(model, quant, Parallel(), machine.device.memory_bytes).tokens // 16 - 1

    fleet = Setting(model, quant, cluster(HARDWARE.replace("1x", "8x")), lambda pool: sources[1])

    def run(count: int, rate: float, mode: str) -> tuple[dict[str, float], float]:
        """Counters, and seconds of CPU."""
        if mode == "prefill-decode":
            ttft = tpot = 0.0

            def sink(served: Served) -> None:
                nonlocal ttft, tpot
                ttft, tpot = ttft + served.ttft, tpot + served.tpot

            begin = time.process_time()
            ran = simulate_plan(FLEET, fleet, requests_of(trace(count, rate)), sink)
            seconds, steps = time.process_time() - begin, sum(sum(pool.steps) for pool in ran.pools.values())
            preempted = sum(pool.preemptions for pool in ran.pools.values())
            return {"steps": steps, "preemptions": preempted, "ttft_mean_s": ttft / count,
                    "tpot_mean_s": tpot / count}, seconds  # fmt: skip
        stages, ids, settings = MODES[mode]
        summary, begin = Summary(), time.process_time()
        (engine,) = simulate(trace(count, rate, ids), sources[stages], Limits(blocks, **settings), summary).engines
        return {"steps": engine.steps, "preemptions": engine.preemptions, "events": engine.clock.events,
                "ttft_mean_s": summary.ttft.mean,
                "tpot_mean_s": summary.tpot.mean}, time.process_time() - begin  # fmt: skip

    def peak(count: int, rate: float, mode: str) -> int:
        tracemalloc.start()
        run(count, rate, mode)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    rows: list[list[str]] = []
    result: list[dict[str, Any]] = []
    for mode, rate in product(args.modes, args.rates):
        runs = [run(requests, rate, mode) for _ in range(repeat)]
        counted = runs[0][0]
        found = {
            "mode": mode,
            "rate": rate,
            "requests_per_cpu_second": requests / statistics.median(seconds for _, seconds in runs),
            **counted,
            "peak_bytes": [peak(max(1, requests // 10), rate, mode), peak(requests, rate, mode)],
        }
        result.append(found)
        rows.append([
            mode,
            f"{rate:g}/s",
            f"{found['requests_per_cpu_second']:,.0f}",
            f"{counted['steps'] / requests:.2f}",
            f"{counted['events'] / requests:.2f}" if "events" in counted else "-",
            f"{counted['ttft_mean_s'] * 1e3:.0f} ms",
            f"{counted['tpot_mean_s'] * 1e3:.1f} ms",
            " / ".join(f"{size / 1024:.0f} KiB" for size in found["peak_bytes"]),
        ])  # fmt: skip
    columns = ["mode", "rate", "requests/s of CPU", "steps each", "events each", "TTFT", "TPOT", "peak, 10 % / all"]
    show_table(f"{requests} requests of {PROMPT}/{OUTPUT} tokens, {MODEL} on {HARDWARE}", columns, rows)
    body = {"model": MODEL, "hardware": HARDWARE, "requests": requests, "rows": result}
    write_result(args.json, "planner_simulator", body, load_before)


if __name__ == "__main__":
    main()
