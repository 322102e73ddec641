"""Puts the live document together, on request, from what the router has already."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from vllm_suite import __version__
from vllm_suite.fleet.predicted import PredictedSpec, PredictedTimes
from vllm_suite.fleet.slo import SloSpec
from vllm_suite.router.members import Member as RouterMember
from vllm_suite.router.members import Pool as RouterPool
from vllm_suite.router.metrics import Live as RouterLive
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.ui import document as doc
from vllm_suite.router.ui.history import SPAN_S, STEP_S, Histogram, History, Snapshot
from vllm_suite.router.ui.pulls import PullRates

ROLES = ("encode", "prefill", "decode", "any")
CACHED_S = 0.5
"""Viewers that ask within so many seconds get the same answer: ten of them cost no more than one."""

SEEN = {
    "ttft": ("ttft_seconds", "first_byte_seconds"),
    "tpot": ("tpot_seconds",),
    "request": ("request_seconds",),
}
"""Histograms of what a client sees: of each name the first series that has been observed. Only streamed answers have
a first token of their own."""

STAGES = ("encode", "queue", "prefill", "first_token", "decode", "answer")
"""Values of the label `stage` in the order of a request; `answer` is both of the last two where nothing is streamed."""

_COUNTERS = ("requests", "decisions", "recoveries", "stream_errors", "slo_requests")
_ON_ITS_WAY = ("closing", "drained", "switching", "verified")
_HISTOGRAMS = (*(name for names in SEEN.values() for name in names), "stage_seconds")


class LiveState:
    """One per router. `tick` is to be called every STEP_S seconds; `document` as often as anybody asks.

    Args:
        missing: addresses that give no answer, by the role they were listed with.
    """

    def __init__(
        self,
        pool: RouterPool,
        live: RouterLive,
        metrics: RouterMetrics,
        slo: SloSpec,
        predicted: PredictedSpec | None,
        missing: Callable[[], dict[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._live = live
        self._metrics = metrics
        self._slo = slo
        self._predicted = predicted
        self._missing = missing
        self._clock = clock
        self._wall = wall
        self._started = wall()
        self._history = History(metrics, _COUNTERS, _HISTOGRAMS, clock)
        self._pulls = PullRates(pool, clock)
        self._rates: deque[float] = deque(maxlen=round(SPAN_S / STEP_S))
        self._slowest: deque[float | None] = deque(maxlen=round(SPAN_S / STEP_S))
        self._cached: doc.Live | None = None
        self._cached_at = float("-inf")

    def tick(self) -> None:
        """Remember where the series stand."""
        self._history.tick()
        self._pulls.tick()
        before, after = self._history.last_step()
        seconds = after.at - before.at
        self._rates.append((after.total("requests") - before.total("requests")) / seconds if seconds > 0 else 0.0)
        self._slowest.append(_ms(_between(before, after, SEEN["ttft"]).quantile(0.99)))

    def document(self) -> doc.Live:
        """The document as of now, at most CACHED_S old."""
        at = self._clock()
        if self._cached is None or at - self._cached_at >= CACHED_S:
            self._cached, self._cached_at = self._make(), at
        return self._cached

    def _make(self) -> doc.Live:
        now, old = self._history.now(), self._history.oldest()
        window_s = max(now.at - old.at, 1e-9)
        pools = self._pools()
        traffic = self._traffic(now, old, window_s)
        latency = _latency(now, old)
        health, headline = _judge(pools, traffic, self._live.draining)
        return doc.Live(
            version=doc.VERSION,
            time=self._wall(),
            suite=__version__,
            started=self._started,
            window_s=window_s,
            health=health,
            headline=headline,
            draining=self._live.draining,
            traffic=traffic,
            pools=pools,
            transfers=self._pulls.transfers(),
            latency=latency,
            targets=self._targets(now, old),
            plan=_plan(self._predicted, traffic.requests_per_s, latency.seen),
            events=self._events(),
        )

    def _pools(self) -> list[doc.Pool]:
        missing = self._missing()
        found: dict[str, list[RouterMember]] = {role: [] for role in ROLES}
        for member in self._pool.members:
            found[member.role].append(member)
        return [_pool(role, found[role], missing.get(role, 0)) for role in ROLES if found[role] or missing.get(role)]

    def _traffic(self, now: Snapshot, old: Snapshot, window_s: float) -> doc.Traffic:
        def since(name: str, **labels: str) -> float:
            return now.total(name, **labels) - old.total(name, **labels)

        codes = {dict(labels)["code"] for (name, labels) in now.counters if name == "requests"}
        failed = sum(since("requests", code=code) for code in codes if code.startswith("5")) + since("stream_errors")
        decided = since("decisions")
        judged = since("slo_requests") - since("slo_requests", verdict="unknown")
        return doc.Traffic(
            in_flight=self._live.requests_in_flight,
            requests_per_s=since("requests") / window_s,
            failed=int(failed),
            refused=int(sum(since("requests", code=code) for code in codes if code.startswith("4") and code != "499")),
            disaggregated=since("decisions", path="disaggregated") / decided if decided else None,
            recoveries=int(since("recoveries")),
            goodput=since("slo_requests", verdict="good") / judged if judged else None,
            step_s=STEP_S,
            rate_series=list(self._rates),
            ttft_p99_series=list(self._slowest),
        )

    def _targets(self, now: Snapshot, old: Snapshot) -> list[doc.Target]:
        rows = []
        for name in ("ttft", "tpot"):
            limit: float | None = getattr(self._slo, name)
            if limit is not None:
                seen = _between(old, now, SEEN[name])
                rows.append(doc.Target(name, limit, seen.share_below(limit / 1000)))
        return rows

    def _events(self) -> list[doc.Event]:
        return [
            doc.Event(
                row.kind, row.what, row.why, row.instance[: doc.MAX_TEXT], row.request, row.began, row.last, row.times
            )
            for row in self._metrics.recent.rows()[: doc.MAX_EVENTS]
        ]


def _between(before: Snapshot, after: Snapshot, names: Iterable[str]) -> Histogram:
    """What the first of these series that has been observed saw between two snapshots."""
    for name in names:
        if name in after.histograms:
            return after.histograms[name].since(before.histograms.get(name, Histogram()))
    return Histogram()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _spread(name: str, histogram: Histogram) -> doc.Spread:
    return doc.Spread(name, _ms(histogram.quantile(0.5)), _ms(histogram.quantile(0.99)), histogram.count)


def _latency(now: Snapshot, old: Snapshot) -> doc.Latency:
    return doc.Latency(
        seen=[_spread(name, _between(old, now, names)) for name, names in SEEN.items()],
        stages=[_spread(name, _between(old, now, (f"stage_seconds/{name}",))) for name in STAGES],
    )


def _pool(role: str, members: list[RouterMember], missing: int) -> doc.Pool:
    rows = [_member(member) for member in members]
    # Where not all fit, those that need attention do.
    rows.sort(key=lambda row: (row.ready, row.instance))
    kept = sorted(rows[: doc.MAX_MEMBERS], key=lambda row: row.instance)
    return doc.Pool(
        role=role,
        instances=len(rows),
        ready=sum(row.ready for row in rows),
        missing=missing,
        running=sum(row.running or 0 for row in rows),
        waiting=sum(row.waiting or 0 for row in rows),
        in_router=sum(row.in_router for row in rows),
        members=kept,
        left_out=len(rows) - len(kept),
    )


def _member(member: RouterMember) -> doc.Member:
    state = member.state
    usage = state.load.get("kv_usage")
    return doc.Member(
        instance=member.instance_id[: doc.MAX_TEXT],
        epoch=member.epoch[:8],
        role=member.role,
        role_epoch=state.role_epoch,
        phase=state.phase[: doc.MAX_TEXT],
        target=state.target,
        ready=member.ready,
        why_not=_why_not(member),
        running=_whole(state.load.get("running")),
        waiting=_whole(state.load.get("waiting")),
        kv_usage=min(1.0, max(0.0, usage)) if isinstance(usage, (int, float)) else None,
        in_router=member.outstanding_requests,
    )


def _whole(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _why_not(member: RouterMember) -> str:
    """In a few words; empty for one that is ready."""
    if not member.reachable:
        return "does not answer"
    if member.suspect:
        return "lost a connection"
    if member.refused_at is not None:
        return "refused its role's work"
    if not member.state.ready:
        return "not ready" if member.state.phase == "serving" else member.state.phase[: doc.MAX_TEXT]
    return ""


def _switches(member: doc.Member) -> bool:
    """Is away because its role changes, as somebody wanted; one that goes back or is out is a trouble."""
    return member.target is not None and member.phase in _ON_ITS_WAY and member.why_not == member.phase


def _judge(pools: list[doc.Pool], traffic: doc.Traffic, draining: bool) -> tuple[doc.Health, str]:
    """What to look at first, in one sentence."""
    if draining:
        return "down", "Draining: running requests end, new ones are refused"
    if not any(pool.ready for pool in pools if pool.role in ("decode", "any")):
        return "down", "No decode instance is ready: requests are refused"
    troubles = []
    switching = [(one.instance, one.role, one.target) for pool in pools for one in pool.members if _switches(one)]
    for pool in pools:
        away = pool.instances - pool.ready + pool.missing - sum(_switches(one) for one in pool.members)
        if away:
            troubles.append(f"{away} of {pool.instances + pool.missing} {pool.role} not ready")
    if traffic.failed:
        troubles.append(f"{traffic.failed} failed request{'s' if traffic.failed > 1 else ''} in the window")
    if troubles:
        return "degraded", "; ".join(troubles)
    if switching:
        return "ok", "; ".join(f"{name} changes from {role} to {target}" for name, role, target in switching[:4])
    count = sum(pool.instances for pool in pools)
    return "ok", f"{'All ' if count > 1 else ''}{count} instance{'s' if count > 1 else ''} ready"


def _plan(predicted: PredictedSpec | None, rate: float, seen: list[doc.Spread]) -> doc.Plan | None:
    if predicted is None:
        return None
    measured = {spread.name: spread for spread in seen}
    rows: list[doc.PlanRow] = []
    for name in ("ttft", "tpot"):
        times: PredictedTimes | None = getattr(predicted, name)
        for quantile in ("p50", "p99") if times is not None else ():
            planned = getattr(times, quantile)
            # Without bounds of its own a figure is as good as a step's time is.
            low = getattr(times, f"{quantile}_low") or planned * (1 - predicted.error)
            high = getattr(times, f"{quantile}_high") or planned * (1 + predicted.error)
            found: float | None = getattr(measured[name], quantile)
            rows.append(doc.PlanRow(f"{name} {quantile}", planned, low, high, found, _verdict(found, low, high)))
    return doc.Plan(predicted.rate, rate, rows)


def _verdict(found: float | None, low: float, high: float) -> doc.Verdict:
    if found is None:
        return "unknown"
    return "slower" if found > high else "quicker" if found < low else "inside"
