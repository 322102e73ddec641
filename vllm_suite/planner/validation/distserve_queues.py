"""D1: the simulator beside the queueing formulas of the DistServe paper."""

from __future__ import annotations

import random
from collections.abc import Iterator

from vllm_suite.planner.distserve.formulas import crossover_rate, ttft_pipeline, ttft_single, ttft_tensor
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.simulator.results import Summary
from vllm_suite.planner.sources.linear import Coefficients, LinearSource
from vllm_suite.planner.validation.check import Check, relative

TIME, COUNT = 0.08, 20_000
_ORIGIN = "equations 1 to 3 of the DistServe paper"
_SPEEDUPS = (1.2, 1.5, 1.8)


def simulated(service: float, rate: float, *, replicas: int = 1, seeds: int = 1, count: int = COUNT) -> float:
    """Mean seconds from arrival to the end of a service of fixed length, of requests dealt out at random."""
    # A pipeline of one stage adds a millisecond to a prefill.
    constant = (service * 1e3 - 1.0, 0.0, 0.0)
    source, summary = LinearSource(Coefficients(constant, constant, constant)), Summary()
    for seed in range(seeds):
        draw = random.Random(seed)
        simulate(
            _poisson(draw, rate, count),
            source,
            Limits(100, max_num_seqs=1),
            summary,
            engines=replicas,
            route=lambda engines, job, now, draw=draw: draw.choice(engines),  # type: ignore[misc]
        )
    return float(summary.ttft.mean)


def _poisson(draw: random.Random, rate: float, count: int) -> Iterator[Job]:
    now = 0.0
    for number in range(count):
        yield Job(number, now, 16, 1)
        now += draw.expovariate(rate)


def queues() -> Iterator[Check]:
    """Mean TTFT of equal prompts by the simulator and by formula, and which of TP and PP it prefers."""
    for load, seeds in ((0.2, 1), (0.5, 2), (0.7, 4)):
        rate = load / TIME
        what = f"mean TTFT s, {{}}, load {load}"
        more = {"note": f"{seeds} x {COUNT} requests"}
        ours = simulated(TIME, rate, seeds=seeds)
        yield relative("D1", what.format("one instance"), ours, ttft_single(TIME, rate), _ORIGIN, 0.03, **more)
        tensor = simulated(TIME / 1.5, rate * 1.5, seeds=seeds)
        exact = ttft_tensor(TIME, rate * 1.5, 1.5)
        yield relative("D1", what.format("TP2, K = 1.5"), tensor, exact, _ORIGIN, 0.03, **more)
        piped = piped_ttft(rate * 2, seeds=seeds)
        exact = ttft_pipeline(TIME, rate * 2)
        yield relative("D1", what.format("PP2"), piped, exact, _ORIGIN, 0.03, **more)
        copies = simulated(TIME, rate * 3, replicas=3, seeds=seeds)
        exact = ttft_single(TIME, rate * 3, replicas=3)
        yield relative("D1", what.format("3 replicas"), copies, exact, _ORIGIN, 0.03, **more)
    signs = {(k, n, x): preferred(k, n, x) for k in _SPEEDUPS for n in (1, 3) for x in (0.8, 1.1)}
    right = sum(found == ("TP" if x < 1 else "PP") for (_, _, x), found in signs.items())
    yield Check(
        "D1",
        "TP at 0.8 and PP at 1.1 of the crossover rate; K 1.2, 1.5, 1.8; 1 and 3 replicas: simulated preferences",
        right,
        len(signs),
        _ORIGIN,
        float(right - len(signs)),
        "exact",
        "holds" if right == len(signs) else "missed",
    )


def piped_ttft(rate: float, *, replicas: int = 1, seeds: int = 1, count: int = COUNT) -> float:
    """Of two equal stages: nobody waits before the second, so it adds its time to the first one's queue."""
    return simulated(TIME / 2, rate, replicas=replicas, seeds=seeds, count=count) + TIME / 2


def preferred(speedup: float, replicas: int, share: float, *, count: int = COUNT) -> str:
    """TP or PP, whichever has the shorter simulated TTFT at a share of the crossover rate."""
    rate = share * crossover_rate(TIME, speedup, replicas=replicas)
    tensor = simulated(TIME / speedup, rate, replicas=replicas, count=count)
    return "TP" if tensor < piped_ttft(rate, replicas=replicas, count=count) else "PP"
