"""CPU time of our scheduler's steps beside vLLM's own: one process, the same requests, alternating steps.

    python benchmarks/replay_overhead.py --running 256 --waiting 256 --json out.json

Two schedulers, each with a worker without a model, are driven in lockstep; which one goes first alternates. A step is
`schedule` and `update_from_output`. Requests that end are replaced, so that as many run and wait all the time. Time is
of the CPU, so that other work on the machine counts less.
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from common import arguments, positive, show_table, write_result
from replay_cases import make_policy
from replay_engine import EngineSettings, Worker, make_request, make_scheduler
from replay_traces import Row
from replay_workload import Room

STEP_S = 0.02


class Lane:
    """One scheduler with its worker and its own virtual clock."""

    def __init__(self, settings: EngineSettings, rows: list[Row], queued: int) -> None:
        self.now = 0.0
        self.scheduler = make_scheduler(settings, lambda: self.now)
        self.worker = Worker(rows, settings)
        self.rows = rows
        self.added = 0
        self.preempted = 0
        for _ in range(queued):
            self._add()

    def _add(self) -> None:
        row = replace(self.rows[self.added], arrival_s=self.now)
        self.scheduler.add_request(make_request(row, self.added))
        self.added += 1

    def step(self) -> float:
        """CPU seconds of one step; requests that end in it are replaced afterwards, outside of the time."""
        self.now += STEP_S
        begin = time.thread_time()
        orders = self.scheduler.schedule()
        middle = time.thread_time()
        _, names, samples = self.worker.begin(self.scheduler, orders)
        report = self.worker.finish(names, samples)
        again = time.thread_time()
        answers = self.scheduler.update_from_output(orders, report)
        seconds = middle - begin + time.thread_time() - again
        for answer in answers[0].outputs if 0 in answers else ():
            if answer.finish_reason is not None:
                self._add()
        return seconds


def requests(seed: int, telling: bool) -> Iterator[Row]:
    """Prompts of 64 to 1,024 tokens, answers of 200 tokens in the mean with a long tail, 20 classes."""
    draw = random.Random(seed)
    while True:
        label = draw.randrange(20)
        kind = label if telling else draw.randrange(20)
        yield Row(0.0, draw.randrange(64, 1024), max(1, int(draw.lognormvariate(4.0 + kind / 12, 0.8))), str(label))


def measure(
    running: int, waiting: int, steps: int, kv_full: bool, policy: str, telling: bool, seed: int = 0
) -> dict[str, Any]:
    """Medians and means of a step's CPU microseconds of both, and their ratio.

    Begins once the requests of the start, when nothing is known of lengths, have begun to run.

    Args:
        kv_full: as much KV cache as makes requests give way; else there is plenty.
    """
    source = requests(seed, telling)
    rows = [next(source) for _ in range(3 * (running + waiting) + steps * max(4, running // 20))]
    room = Room(blocks=running * 45 if kv_full else running * 400, seqs=running)
    settings = EngineSettings(room=room)
    lanes = [Lane(settings, rows, running + waiting), Lane(make_policy(policy, settings)[0], rows, running + waiting)]
    for lane in lanes:
        while lane.added < 2 * running + waiting:
            lane.step()
    added = [lane.added for lane in lanes]
    times: list[list[float]] = [[], []]
    counts: list[list[int]] = [[], []]
    gc.collect()
    gc.disable()
    try:
        for number in range(steps):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].append(lanes[which].step())
                counts[which].append(len(lanes[which].scheduler.running))
    finally:
        gc.enable()
    mean = [statistics.fmean(each) * 1e6 for each in times]
    median = [statistics.median(each) * 1e6 for each in times]
    return {
        "running": [statistics.fmean(each) for each in counts],
        "waiting": [len(lane.scheduler.waiting) for lane in lanes],
        "classes": "telling" if telling else "alike",
        "kv_full": kv_full,
        "steps": steps,
        "ended": [(lane.added - before) / steps for lane, before in zip(lanes, added, strict=True)],
        "mean_us": mean,
        "median_us": median,
        "mean_ratio": mean[1] / mean[0],
        "median_ratio": median[1] / median[0],
    }


def main(argv: list[str] | None = None) -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--running", type=positive, default=256, metavar="N")
    parser.add_argument("--waiting", type=positive, nargs="+", default=[16, 256, 2000], metavar="N")
    parser.add_argument("--steps", type=positive, default=2000)
    parser.add_argument("--classes", choices=("alike", "telling"), nargs="+", default=["alike", "telling"])
    parser.add_argument("--policy", default="ours")
    args = parser.parse_args(argv)
    load = os.getloadavg()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    torch.set_num_threads(1)
    results = []
    steps = 200 if args.quick else args.steps
    for classes, waiting, kv_full in itertools.product(args.classes, args.waiting, (False, True)):
        print(f"classes {classes}, {waiting} waiting, KV cache {'full' if kv_full else 'free'}", file=sys.stderr)
        found = measure(args.running, waiting, steps, kv_full, args.policy, classes == "telling")
        results.append({"asked": waiting, **found})
    show_table(
        "CPU time of a step: schedule and update_from_output",
        ["classes", "waiting", "KV", "running", "ended", "vLLM, us", "ours, us", "ratio of means", "ratio of medians"],
        [
            [
                one["classes"],
                str(one["asked"]),
                "full" if one["kv_full"] else "free",
                f"{one['running'][1]:.0f}",
                "/".join(f"{each:.2f}" for each in one["ended"]),
                f"{one['mean_us'][0]:.0f}",
                f"{one['mean_us'][1]:.0f}",
                f"{one['mean_ratio']:.3f}",
                f"{one['median_ratio']:.3f}",
            ]
            for one in results
        ],
    )
    write_result(args.json, "scheduler_overhead", {"running": args.running, "results": results}, load)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
