"""What the live page costs the router: CPU time of one look, of one copy of the series, and the size of the answer.

The page of one viewer asks once a second; looks within half a second share one answer. The series are copied every
five seconds, watched or not.

    python benchmarks/bench_ui.py [--quick] [--json FILE]
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import msgspec
from common import arguments, show_table, write_result

from vllm_suite.fleet.slo import SloSpec
from vllm_suite.router.members import Member, Pool, Pulled, State
from vllm_suite.router.metrics import Live, RouterMetrics
from vllm_suite.router.targets import Targets
from vllm_suite.router.ui.history import SPAN_S, STEP_S
from vllm_suite.router.ui.state import LiveState

SIZES = (4, 64, 256)
STAGES = ("encode", "queue", "prefill", "first_token", "decode")


def router(instances: int, now: list[float]) -> tuple[LiveState, RouterMetrics]:
    """A router with so many instances, half of them prefill, each pair of which has exchanged blocks."""
    pool, live, slo = Pool(), Live(0, 4.0), SloSpec(ttft=300.0, tpot=40.0)
    half = instances // 2
    load = {"running": 5, "waiting": 2, "kv_usage": 0.4}
    for index in range(half):
        pool.admit(Member("http://p", State(f"p-{index}", "e", "prefill", True, ("m",), load=load), "prefill", 64))
        pulled = tuple(Pulled("kv", f"p-{peer}", 1e9, 1e3) for peer in range(min(half, 64)))
        said = State(f"d-{index}", "e", "decode", True, ("m",), load=load, pulled=pulled)
        pool.admit(Member("http://d", said, "decode", 64))
    metrics = RouterMetrics(pool, live, Targets(slo))
    return LiveState(pool, live, metrics, slo, None, clock=lambda: now[0]), metrics


def traffic(metrics: RouterMetrics, instances: int, draw: random.Random) -> None:
    """What some requests leave in the series."""
    for _ in range(20):
        metrics.count("requests", "chat", "200")
        metrics.count("decisions", "disaggregated", "prefill")
        metrics.count("picks", "decode", f"d-{draw.randrange(instances // 2)}")
        for stage in STAGES:
            metrics.observe(draw.expovariate(10), "stage_seconds", "disaggregated", stage)
        metrics.recovered("decode_retry", "connect", f"d-{draw.randrange(instances // 2)}", str(draw.random()))


def cpu_ms(call: Callable[[], object], rounds: int) -> float:
    """Median CPU time of a call in milliseconds."""
    times = []
    for _ in range(rounds):
        began = time.process_time_ns()
        call()
        times.append((time.process_time_ns() - began) / 1e6)
    return statistics.median(times)


def main() -> int:
    """Print the table; 0."""
    args = arguments(__doc__ or "").parse_args()
    load, rounds, draw = os.getloadavg(), 5 if args.quick else 200, random.Random(0)
    rows, found = [], {}
    for size in SIZES:
        now = [0.0]
        state, metrics = router(size, now)
        for _ in range(round(SPAN_S / STEP_S)):
            traffic(metrics, size, draw)
            now[0] += STEP_S
            state.tick()

        def look(state: LiveState = state, now: list[float] = now) -> bytes:
            now[0] += 1.0
            return msgspec.json.encode(state.document())

        def copy(state: LiveState = state, now: list[float] = now) -> None:
            now[0] += STEP_S
            state.tick()

        found[size] = {"look_ms": cpu_ms(look, rounds), "copy_ms": cpu_ms(copy, rounds), "bytes": len(look())}
        one = found[size]
        rows.append([str(size), f"{one['look_ms']:.2f}", f"{one['copy_ms']:.2f}", f"{one['bytes']:,}"])
    show_table("live page, CPU", ("instances", "look, ms", "copy, ms", "answer, bytes"), rows)
    write_result(args.json, "ui", {"by_instances": found}, load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
