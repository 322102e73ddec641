"""`Evaluate` by simulation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import gcd

from vllm_suite.planner.evaluate import evaluate
from vllm_suite.planner.plan import Plan, Slo
from vllm_suite.planner.search.horizon import Horizon
from vllm_suite.planner.search.trial import Trial, Until
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.traces import Workload
from vllm_suite.planner.workload import Request

PART = 16
"""Accelerators that a part of a large fleet has at least."""


class _Decided(Exception):
    """Nothing that is still to come changes the answer."""


class _Count:
    """A sink that counts who met the targets, and stops when the answer is certain or all that count are done.

    A fleet starts empty, which serves the first requests too well. So these speak for nothing, but against it: the
    targets are met where enough of those that count meet them, and enough of all up to the last of these. A request
    that is not done by the time that both targets together allow has missed one of them, however long it still takes.
    """

    def __init__(self, slo: Slo, requests: Sequence[Request], counted: range, until: Until) -> None:
        self.slo, self.requests, self.which, self.until = slo, requests, counted, until
        self.met = self.missed = self.early = self.filled = 0
        self.need = math.ceil(slo.attainment * len(counted) - 1e-9)
        self.spare = math.floor((1 - slo.attainment) * counted.stop + 1e-9)
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.latency = 0.0
        # Of each request: 1 when it is done, 2 when it is overdue and so judged already.
        self._state = bytearray(len(requests))

    def arriving(self) -> Iterator[Request]:
        """The requests as the simulator draws them, one ahead of its clock; looks for overdue ones on the way."""
        ttft, tpot = self.slo.ttft, self.slo.tpot
        if self.until == "end" or ttft is None or tpot is None:
            yield from self.requests
            return
        due = sorted(
            (each.arrival + ttft + tpot * (each.output - 1), each.number) for each in self.requests[: self.which.stop]
        )
        place, now, state = 0, 0.0, self._state
        for request in self.requests:
            while place < len(due) and due[place][0] * (1 + 1e-9) < now:
                number = due[place][1]
                if not state[number]:
                    state[number] = 2
                    self._judge(number, False)
                place += 1
            yield request
            now = request.arrival

    def __call__(self, served: Served) -> None:
        number = served.number
        if number >= self.which.stop:
            return
        ttft, tpot = served.ttft, served.tpot
        if number >= self.which.start:
            self.latency += served.latency
            self.ttft.append(ttft)
            self.tpot.append(tpot)
        judged = self._state[number] == 2
        self._state[number] = 1
        if not judged:
            self._judge(number, self.slo.met(ttft, tpot))
        if self.whole:
            raise _Decided

    def _judge(self, number: int, good: bool) -> None:
        if number < self.which.start:
            self.filled += 1
            self.early += not good
        else:
            self.met += good
            self.missed += not good
        if not good and self.until != "end" and self.failed:
            raise _Decided
        if good and self.until == "decided" and self.met >= self.need and self.certain:
            raise _Decided

    @property
    def whole(self) -> bool:
        """Whether all that count are done."""
        return len(self.ttft) == len(self.which)

    @property
    def failed(self) -> bool:
        """Whether too many have missed."""
        return self.missed > len(self.which) - self.need or self.missed + self.early > self.spare

    @property
    def certain(self) -> bool:
        """Whether the targets are met even if all that is to come misses them."""
        left = self.which.stop - self.met - self.missed - self.filled
        return self.met >= self.need and self.missed + self.early + left <= self.spare


@dataclass(frozen=True)
class Simulated:
    """Plans on a workload.

    Attributes:
        horizon: how many requests a simulation takes; a shorter trace is repeated.
        seed: of what the workload draws.
        energy: whole trials of plans that meet the targets say joules per token too.
    """

    setting: Setting
    workload: Workload
    slo: Slo
    horizon: Horizon
    seed: int = 0
    energy: bool = False

    def requests(self, rate: float) -> list[Request]:
        """Of one simulation."""
        count, known = self.horizon.count(rate), self.workload.count
        return list(self.workload.requests(rate, count, self.seed, repeat=known is not None and known < count))

    def __call__(self, plan: Plan, rate: float, until: Until = "end") -> Trial:
        """See `Evaluate`."""
        asked, (plan, rate) = rate, part(plan, rate)
        requests = self.requests(rate)
        sink = _Count(self.slo, requests, self.horizon.counted([each.arrival for each in requests]), until)
        setting = self.setting.settled(plan, lambda: requests)
        with contextlib.suppress(_Decided):
            simulate_plan(plan, setting, sink.arriving(), sink)
        met, seen = sink.met >= sink.need and not sink.failed, sink.met + sink.missed
        if not sink.whole:
            # Of a run that was cut short nothing but the answer holds.
            return Trial(asked, sink.met / seen if seen else 0.0, 0.0, 1.0, met, whole=False)
        return Trial(
            asked, sink.met / seen, *interval(sink.met, seen), met, latency=sink.latency / seen,
            ttft=_quantile(sink.ttft, self.slo.attainment), tpot=_quantile(sink.tpot, self.slo.attainment),
            energy=self._joules(plan, requests) if self.energy and met else math.nan,
        )  # fmt: skip

    def _joules(self, plan: Plan, requests: list[Request]) -> float:
        """Per generated token, in a second run to the end."""
        found = evaluate(plan, self.setting, lambda: requests, self.slo, energy=True).joules_per_token
        return math.nan if found is None else found


def parts(plan: Plan) -> int:
    """How many equal parts of at least `PART` accelerators a fleet has."""
    common = gcd(*(pool.count for pool in plan.pools))
    return max(n for n in range(1, common + 1) if common % n == 0 and (n == 1 or plan.gpus >= n * PART))


def part(plan: Plan, rate: float) -> tuple[Plan, float]:
    """Of a large fleet of several equal parts one of them, of at least `PART` accelerators, and its share of the rate.

    A router over all parts evens out their queues better than one over a single part, so this errs on the safe side.
    """
    times = parts(plan)
    if times == 1:
        return plan, rate
    pools = (replace(pool, count=pool.count // times, ranks=pool.ranks[: pool.count // times]) for pool in plan.pools)
    return Plan(tuple(pools)), rate / times


def interval(met: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z = 1.96
    share, spread = met / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _quantile(values: list[float], share: float) -> float:
    values.sort()
    return values[min(len(values) - 1, math.ceil(share * len(values)) - 1)]
