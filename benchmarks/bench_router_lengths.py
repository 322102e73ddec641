"""Least outstanding tokens, counted with equal, learned or true output lengths: a trace over several instances.

The router's own policy picks an instance for each request of a trace in order of arrival. An instance is simulated:
what runs gets one token a step, a step takes 9 ms and 20 us for each sequence, and the others wait in line. With
`--bound slots` so many sequences run at once; with `--bound kv` as many as fit into a KV cache that holds `--slots` of
them on average, each with its whole prompt and answer from the beginning. Prompts cost no time. The arrivals are scaled
so that the instances have `--load` of what they do with all slots taken. Latency is from arrival to the last token.

    same        max_tokens, the same for all: what the router counts without learning
    learned     the expected length by class, from the answers that have ended by then
    true        the length itself, which nobody knows

    python benchmarks/bench_router_lengths.py [--trace servegen_r1_SAMPLED_5000.csv] [--json FILE]
"""

from __future__ import annotations

import heapq
import os
import random
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, positive, show_table, write_result

from vllm_suite.lengths import OnlineLengths
from vllm_suite.router.config import Policies
from vllm_suite.router.policies import Candidate, Demand, make_policy

STEP_S, SEQUENCE_S = 0.009, 20e-6


class Waiting(NamedTuple):
    """A request, with what the router counts for it."""

    number: int
    tokens: int
    charge: int
    size: int


@dataclass(order=True)
class Running:
    """A sequence in a slot; it ends when its instance has made so many tokens for each slot."""

    ends_at: float
    request: Waiting


@dataclass
class Instance:
    """Processor sharing over slots, first come, first served before them."""

    slots: int
    room: float  # KV tokens
    made: float = 0.0  # tokens that a sequence that always ran would have
    at_s: float = 0.0
    outstanding: int = 0
    running: list[Running] = field(default_factory=list)
    held: int = 0  # KV tokens
    waiting: deque[Waiting] = field(default_factory=deque)

    def step_s(self) -> float:
        return STEP_S + SEQUENCE_S * len(self.running)

    def next_end_s(self) -> float:
        if not self.running:
            return float("inf")
        return self.at_s + (self.running[0].ends_at - self.made) * self.step_s()

    def advance(self, to_s: float) -> None:
        if self.running:
            self.made += (to_s - self.at_s) / self.step_s()
        self.at_s = to_s

    def admit(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            # A request larger than the cache runs alone.
            if self.running and self.held + self.waiting[0].size > self.room:
                break
            first = self.waiting.popleft()
            self.held += first.size
            heapq.heappush(self.running, Running(self.made + first.tokens, first))


def replay(rows: Sequence[Any], way: str, instances: Sequence[Instance], stretch: float, limit: int) -> list[float]:
    """Latency of each request in seconds."""
    policy, lengths = make_policy("least_tokens", Policies()), OnlineLengths()
    latencies = [0.0] * len(rows)

    def ends(until_s: float) -> None:
        while True:
            one = min(instances, key=Instance.next_end_s)
            end_s = one.next_end_s()
            if end_s > until_s:
                break
            one.advance(end_s)
            done = heapq.heappop(one.running).request
            one.outstanding -= done.charge
            one.held -= done.size
            row = rows[done.number]
            latencies[done.number] = end_s - row.arrival_s * stretch
            lengths.observe([f"class:{row.label}"], min(row.output, limit), censored=row.output > limit, now=end_s)
            one.admit()

    for number, row in enumerate(rows):
        now_s = row.arrival_s * stretch
        ends(now_s)
        tokens = min(row.output, limit)
        charge = {"same": limit, "true": tokens}.get(way)
        if charge is None:
            charge = round(lengths.remaining([f"class:{row.label}"], 0, limit) or limit)
        charge += row.prompt
        candidates = [
            Candidate(f"i{index}", "e", index, len(one.running) + len(one.waiting), one.outstanding, len(one.waiting))
            for index, one in enumerate(instances)
        ]
        chosen = instances[policy.choose(candidates, Demand(row.prompt, None))]
        chosen.advance(now_s)
        chosen.outstanding += charge
        chosen.waiting.append(Waiting(number, tokens, charge, row.prompt + tokens))
        chosen.admit()
    ends(float("1e18"))
    return latencies


def drawn(count: int) -> list[Any]:
    """Poisson arrivals of 20 classes whose medians lie between 50 and 5000 tokens."""
    from replay_traces import Row

    rng, now_s, rows = random.Random(1), 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(1.0)
        label = rng.randrange(20)
        output = max(1, round(50 * 100 ** (label / 19) * rng.lognormvariate(0.0, 0.6)))
        rows.append(Row(now_s, 200, output, str(label)))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="with arrivals; without it 20 log-normal classes")
    parser.add_argument("--instances", type=positive, default=4)
    parser.add_argument("--slots", type=positive, default=16)
    parser.add_argument("--load", type=float, nargs="+", default=[0.7, 0.9, 1.0])
    parser.add_argument("--max-tokens", type=positive, default=32_768)
    parser.add_argument("--bound", choices=["slots", "kv"], default="slots")
    args = parser.parse_args(argv)
    before = os.getloadavg()
    from replay_traces import read_rows

    rows = [row for row in read_rows(args.trace) if row.arrival_s is not None] if args.trace else drawn(4000)
    rows = rows[: 500 if args.quick else None]
    if not rows:
        parser.error(f"{args.trace} has no arrivals")
    work = statistics.fmean(min(row.output, args.max_tokens) for row in rows)
    able = args.instances * args.slots / (STEP_S + SEQUENCE_S * args.slots) / work  # requests per second
    span_s = rows[-1].arrival_s - rows[0].arrival_s
    room = float("inf")
    if args.bound == "kv":
        held = sum((row.prompt + row.output) * row.output for row in rows) / sum(row.output for row in rows)
        room = args.slots * held
    found: dict[str, dict[str, dict[str, float]]] = {}
    for load in args.load:
        stretch = len(rows) / (able * load) / span_s
        table = []
        for way in ("same", "learned", "true"):
            instances = [Instance(1024 if args.bound == "kv" else args.slots, room) for _ in range(args.instances)]
            all_s = sorted(replay(rows, way, instances, stretch, args.max_tokens))
            figures = {"mean": statistics.fmean(all_s), **{f"p{q}": all_s[len(all_s) * q // 100] for q in (50, 95, 99)}}
            found.setdefault(f"{load:g}", {})[way] = figures
            table.append([way, *(f"{value:.2f}" for value in figures.values())])
        show_table(f"load {load:g}, seconds", ["counted", "mean", "p50", "p95", "p99"], table)
    options = {key: getattr(args, key) for key in ("instances", "slots", "max_tokens", "bound")}
    write_result(args.json, "bench_router_lengths", {"arguments": options, "latency_s": found}, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
