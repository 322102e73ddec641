"""Goodput that does not depend on how many requests are simulated.

DistServe's simulator counts N requests from an empty system on, so a small N never sees the load it asks for: on
OPT-66B a request lives longer than 150 of them take to arrive. Here requests that arrived while the system filled up
and those that outlived the arrivals are left out, and attainment is that of both targets together. Near its capacity a
system may run well for a thousand requests and badly for the next thousand, so short runs only find the rates that are
worth a long one, which decides and whose batches give the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_suite.planner.distserve.parity import Latencies, Workload, sample
from vllm_suite.planner.plan import Slo
from vllm_suite.planner.sources.base import FloatArray

BATCHES = 10
_STUDENT = 2.262
"""The 97.5 % point of Student's distribution with BATCHES - 1 degrees of freedom."""
WARM_UP = 5.0
"""Requests left out at the start, in requests in flight."""


@dataclass(frozen=True)
class Trial:
    """What a simulation gave, of every request in the order of arrival: seconds."""

    ttft: FloatArray
    tpot: FloatArray
    latency: FloatArray


Run = Callable[[float, int], Trial]
"""Simulates so many requests at so many per second; the same ones for the same number."""


@dataclass(frozen=True)
class Attainment:
    """Share of requests that meet both targets.

    Attributes:
        share, half_width: with its 95 % interval.
        counted, simulated: requests.
        steady: whether the run was long beside the number in flight. If not, all requests count, which is more than in
            the steady state, if there is one.
    """

    share: float
    half_width: float
    counted: int
    simulated: int
    steady: bool

    def reaches(self, target: float) -> bool:
        """Whether a fleet may be planned with it."""
        return self.steady and self.share >= target


def run_of(lengths: Sequence[tuple[int, int]], serve: Callable[[Workload], Latencies], *, seed: int = 0) -> Run:
    """Runs of a simulation by DistServe's rules on a data set: `serve` is `parity.simulate` or one like it."""

    def run(rate: float, count: int) -> Trial:
        work = sample(lengths, rate, count, seed=seed)
        found = serve(work)
        ttft, tpot = found.ttft / 1000, found.tpot / 1000
        return Trial(ttft, tpot, ttft + tpot * work.output)

    return run


def attainment(run: Run, rate: float, slo: Slo, *, count: int, most: int | None = None) -> Attainment:
    """Simulate until `count` requests of the steady state are counted.

    Stops where even a run from an empty system, which does no worse, surely misses the target.

    Args:
        most: simulated at most; None for eight times `count`.
    """
    limit = most or 8 * count
    total = min(limit, 2 * count)
    while True:
        trial = run(rate, total)
        met = _met(trial, slo)
        fresh = _interval(met)
        flying = rate * float(trial.latency[total // 2 :].mean())
        first, last = math.ceil(WARM_UP * flying), total - math.ceil(flying)
        if last - first >= count:
            return Attainment(*_interval(met[first:last]), last - first, total, steady=True)
        if total >= limit or fresh[0] + fresh[1] < slo.attainment:
            return Attainment(*fresh, total, total, steady=False)
        needed = first + count + (total - last)
        total = min(limit, max(needed + needed // 8, total + total // 4))


@dataclass(frozen=True)
class Goodput:
    """The largest rate at which the target is reached.

    Attributes:
        rate: requests per second, to the resolution of the search; 0 for none.
        at, above: attainment there and one step further; None at 0 and at the highest rate.
        simulated: requests in all.
    """

    rate: float
    at: Attainment | None
    above: Attainment | None
    simulated: int


def goodput(run: Run, slo: Slo, highest: float, resolution: float, *, scout: int = 300, decide: int = 6000) -> Goodput:
    """Bisect the rate between 0 and `highest` with short runs, then walk in steps of `resolution` with long ones.

    Args:
        highest: that can be asked for; the steps are its halves, quarters and so on, no wider than `resolution`.
        scout, decide: requests counted in a short and in a long run.

    Raises:
        ValueError: a range without a rate.
    """
    if not (resolution > 0 and 0 < highest < math.inf):
        raise ValueError(f"goodput: rates from 0 to {highest} in steps of {resolution}")
    steps = 2 ** max(0, math.ceil(math.log2(highest / resolution)))
    known: dict[int, Attainment] = {}
    simulated = 0

    def asked(step: int, count: int) -> Attainment:
        nonlocal simulated
        found = attainment(run, highest * step / steps, slo, count=count)
        simulated += found.simulated
        return found

    def decided(step: int) -> bool:
        if step not in known:
            known[step] = asked(step, decide)
        return known[step].reaches(slo.attainment)

    low, high = 0, steps
    while high - low > 1:
        middle = (low + high) // 2
        if asked(middle, scout).reaches(slo.attainment):
            low = middle
        else:
            high = middle
    while low and not decided(low):
        low -= 1
    while low + 1 < steps and decided(low + 1):
        low += 1
    return Goodput(highest * low / steps, known.get(low), known.get(low + 1), simulated)


def _met(trial: Trial, slo: Slo) -> FloatArray:
    first = trial.ttft <= (math.inf if slo.ttft is None else slo.ttft)
    later = trial.tpot <= (math.inf if slo.tpot is None else slo.tpot)
    return (first & later).astype(float)


def _interval(met: FloatArray) -> tuple[float, float]:
    """Mean and half width of its interval from the means of batches."""
    count = len(met) // BATCHES * BATCHES
    if not count:
        return float(met.mean()), 1.0
    means = met[len(met) - count :].reshape(BATCHES, -1).mean(axis=1)
    # Where no request missed or all did, a share of 3 / n the other way would still not have shown in 95 % of runs.
    return float(met.mean()), max(3.0 / count, _STUDENT * float(means.std(ddof=1)) / math.sqrt(BATCHES))
