"""What a simulated plan gave: distributions, joint attainment with its interval, utilisation, energy and money."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from vllm_suite.planner.plan import Plan, Slo
from vllm_suite.planner.simulator.fleet import FleetRun
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.steady import Trend, Window, share_interval, window
from vllm_suite.planner.tally import PLACE, STAGES, STRETCHES, Floats, Tally

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Spread:
    """Seconds: mean, quantiles (to 0.25 %), and what the share of requests that is asked for stays under."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    at_share: float


@dataclass(frozen=True)
class PoolLoad:
    """Of one pool: share of the time that its engines were in steps, of its cache blocks the mean and the most taken,
    and the seconds of its pulls, summed.
    """

    utilisation: float
    kv_mean: float
    kv_max: float
    preemptions: int
    transfer_seconds: float


@dataclass(frozen=True)
class Outcome:
    """One plan at one rate.

    Attributes:
        rate: requests per second that arrived.
        requests, counted: in the run, and of them those that the figures are of.
        warm_up_s, tail_s: seconds of arrivals at both ends that are left out.
        trend: see `steady.Trend`.
        ttft, tpot, latency, longest_gap: seconds; TPOT and gaps of requests with more than one token.
        stages: mean seconds of the requests that went through each; see `tally.STAGES`.
        attainment, low, high: share that met both targets, and its 95 % interval.
        ttft_met, tpot_met: shares that met each.
        tokens_per_s: generated.
        load_error: standard error of the mean prompt or output length in the run, relatively, the larger of the two:
            how far the load may be from that of other requests of the same kind.
        gpus: of the plan.
        pools: by role.
        preempted: per request.
        cached: share of the prompt tokens that prefix caches had.
        joules_per_token: per generated token, idle accelerators included; None where it was not asked for.
        money_per_million: generated tokens; None where the hardware has no price.
        end_s: when the last request was done.
    """

    rate: float
    requests: int
    counted: int
    warm_up_s: float
    tail_s: float
    trend: Trend
    ttft: Spread
    tpot: Spread
    latency: Spread
    longest_gap: Spread
    stages: Mapping[str, float]
    attainment: float
    low: float
    high: float
    ttft_met: float
    tpot_met: float
    tokens_per_s: float
    load_error: float
    gpus: int
    pools: Mapping[str, PoolLoad] = field(default_factory=dict)
    preempted: float = 0.0
    cached: float = 0.0
    joules_per_token: float | None = None
    money_per_million: float | None = None
    end_s: float = 0.0

    @property
    def steady(self) -> bool:
        """Whether a longer run would say the same."""
        return self.trend == "steady"

    @property
    def good(self) -> float:
        """Requests per second and accelerator that met both targets."""
        return self.rate * self.attainment / self.gpus

    def as_json(self) -> dict[str, Any]:
        """For files; nan becomes None."""
        found = _plain(asdict(self))
        assert isinstance(found, dict)
        return {**found, "steady": self.steady, "good_per_gpu": self.good}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Collector:
    """A sink for `simulate_plan` that judges which part of the run counts. Its memory does not grow with the run.

    Args:
        slo: targets.
        warm_up: seconds of arrivals to leave out at the beginning, nothing at the end; None to judge both ends.
        stationary: the traffic is alike from beginning to end, so that what changes is the fleet's doing; a recorded
            trace is not.
    """

    def __init__(self, slo: Slo, warm_up: float | None = None, *, stationary: bool = True) -> None:
        self.slo, self.warm_up, self.stationary = slo, warm_up, stationary
        self.tally = Tally(slo)

    def __call__(self, served: Served) -> None:
        """Count a finished request."""
        self.tally(served)

    def window(self) -> Window:
        """The stretches of the tally that count."""
        tally = self.tally
        tally.flush()
        size = min(STRETCHES, int(tally.last_arrival / tally.width) + 1) if tally.width else 0
        if self.warm_up is not None:
            return Window(min(size, math.ceil(self.warm_up / tally.width)) if tally.width else 0, size, "steady")
        counts = tally.sums[:size, PLACE["count"]]
        return window(
            counts, self._means("ttft", "count", size), self._means("tpot", "decoding", size),
            float(tally.sums[:, PLACE["latency"]].sum() / max(1.0, counts.sum())), tally.width,
            tally.last_arrival, self.stationary,
        )  # fmt: skip

    def _means(self, metric: str, of: str, size: int) -> Floats:
        counts = self.tally.sums[:size, PLACE[of]]
        return np.where(counts > 0, self.tally.sums[:size, PLACE[metric]] / np.maximum(counts, 1), math.nan)

    def outcome(
        self, plan: Plan, run: FleetRun, setting: Setting, rate: float | None = None, joules: float | None = None
    ) -> Outcome:
        """The result of a run whose requests all went into this sink.

        Args:
            rate: requests per second that were asked for; None for that of the arrivals counted.
            joules: above idle, of all accelerators over the whole run (`energy.Meter.joules`); None where it was not
                asked for.

        Raises:
            ValueError: no request came in.
        """
        part, tally = self.window(), self.tally
        begin, end = part.begin, part.end
        sums = tally.sums[begin:end]
        total = dict(zip(PLACE, sums.sum(axis=0).tolist(), strict=True))
        if not total["count"]:
            raise ValueError(f"{plan.name}: no request to judge, of {int(tally.sums[:, 0].sum())} in the run")
        last = tally.last_arrival
        seconds = min(last, end * tally.width) - begin * tally.width
        arrived = total["count"] / seconds if seconds > 0 else math.nan
        rate = arrived if rate is None else rate
        everything = tally.sums.sum(axis=0)
        if part.trend == "steady" and self.warm_up is None:
            tokens = rate * total["output"] / total["count"]
        else:
            tokens = float(everything[PLACE["output"]]) / run.end if run.end else math.nan
        latency = total["latency"] / total["count"]
        hits, counts = sums[:, PLACE["attained"]], sums[:, PLACE["count"]]
        low, high = share_interval(hits, counts, math.ceil(2 * latency / tally.width) if tally.width else 1)
        price, cluster = setting.cluster.device.price_per_hour, setting.cluster
        idle = cluster.device.power.idle_w * plan.gpus / tokens if tokens else math.nan
        dynamic = None if joules is None else joules / float(everything[PLACE["output"]])
        return Outcome(
            rate=rate,
            requests=int(everything[PLACE["count"]]),
            counted=int(total["count"]),
            warm_up_s=begin * tally.width,
            tail_s=max(0.0, last - end * tally.width),
            trend=part.trend,
            ttft=self._spread("ttft", "count", part),
            tpot=self._spread("tpot", "decoding", part),
            latency=self._spread("latency", "count", part),
            longest_gap=self._spread("longest_gap", "decoding", part),
            stages={name: total[name] / total[name + "s"] for name in STAGES if total[name + "s"]},
            attainment=total["attained"] / total["count"],
            low=low,
            high=high,
            ttft_met=total["ttft_met"] / total["count"],
            tpot_met=total["tpot_met"] / total["count"],
            tokens_per_s=tokens,
            load_error=max(_error(total, "prompt"), _error(total, "output")),
            gpus=plan.gpus,
            pools=_loads(run),
            preempted=total["preemptions"] / total["count"],
            cached=total["cached"] / total["prompt"],
            joules_per_token=None if dynamic is None else dynamic + idle,
            money_per_million=None if price is None else price * plan.gpus / 3600 / tokens * 1e6,
            end_s=run.end,
        )

    def _spread(self, metric: str, of: str, part: Window) -> Spread:
        tally, ends = self.tally, (part.begin, part.end)
        sums = tally.sums[part.begin : part.end]
        count = float(sums[:, PLACE[of]].sum())
        values = {name: tally.quantile(metric, q, *ends) for name, q in QUANTILES.items()}
        mean = float(sums[:, PLACE[metric]].sum()) / count if count else math.nan
        return Spread(mean=mean, **values, at_share=tally.quantile(metric, self.slo.attainment, *ends))


def _error(total: Mapping[str, float], length: str) -> float:
    count, mean = total["count"], total[length] / total["count"]
    return math.sqrt(max(0.0, total[f"{length}_squares"] / count - mean * mean) / count) / mean


def _loads(run: FleetRun) -> dict[str, PoolLoad]:
    return {
        role: PoolLoad(pool.utilisation, pool.kv_mean, pool.kv_max, pool.preemptions, pool.transfer_seconds)
        for role, pool in run.pools.items()
    }
