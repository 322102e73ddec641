"""What `GET /ui/state` answers, read by the page and by `vllm-suite top`.

Times of day are Unix seconds, durations milliseconds unless the name says otherwise, shares 0 to 1. What is not known
is null, never 0. `VERSION` changes when a field changes its meaning; fields may be added.
"""

from __future__ import annotations

from typing import Literal

import msgspec

VERSION = 1
MAX_MEMBERS = 128
MAX_PAIRS = 64
MAX_EVENTS = 50
MAX_TEXT = 128
"""Bounds of the lists and of every text that comes from outside: an answer stays below 512 kB."""

Health = Literal["ok", "degraded", "down"]
Verdict = Literal["inside", "quicker", "slower", "unknown"]


class Member(msgspec.Struct, frozen=True):
    """One instance. `waiting` and `running` are its own counts, `in_router` what this router has sent and not got back.

    Attributes:
        epoch: the first 8 digits of what it drew at its start: another one is another life.
        role: what it does now; `target` while a switch goes on.
        phase: of a role switch; `serving` without one.
        kv_usage: used share of its KV cache.
    """

    instance: str
    epoch: str
    role: str
    role_epoch: int
    phase: str
    target: str | None
    ready: bool
    why_not: str
    running: int | None
    waiting: int | None
    kv_usage: float | None
    in_router: int


class Pool(msgspec.Struct, frozen=True):
    """The instances of one role in sum, and each of them; `left_out` of them are not listed.

    `missing` addresses were listed with this role and give no answer.
    """

    role: str
    instances: int
    ready: int
    missing: int
    running: int
    waiting: int
    in_router: int
    members: list[Member]
    left_out: int


class Pair(msgspec.Struct, frozen=True):
    """What `target` pulled from `source`: KV blocks (`kv`) or encoder outputs (`ec`). Totals since `target` started."""

    kind: Literal["kv", "ec"]
    source: str
    target: str
    bytes_per_s: float | None
    pulls_per_s: float | None
    bytes_total: float
    pulls_total: float | None


class Transfers(msgspec.Struct, frozen=True):
    """Sums over all pairs, and the busiest of them."""

    kv_bytes_per_s: float | None
    ec_bytes_per_s: float | None
    kv_pulls_per_s: float | None
    pairs: list[Pair]
    left_out: int


class Spread(msgspec.Struct, frozen=True):
    """Percentiles of one latency over the window; null where nothing was measured."""

    name: str
    p50: float | None
    p99: float | None
    count: int


class Latency(msgspec.Struct, frozen=True):
    """What clients saw, and where the time to the first token went. Stages are in the order of a request."""

    seen: list[Spread]
    stages: list[Spread]


class Target(msgspec.Struct, frozen=True):
    """One objective, and the share of the window's requests that met it."""

    name: str
    limit: float
    attained: float | None


class PlanRow(msgspec.Struct, frozen=True):
    """A figure of the plan with its band, beside what is measured."""

    name: str
    planned: float
    low: float
    high: float
    measured: float | None
    verdict: Verdict


class Plan(msgspec.Struct, frozen=True):
    """Figures are promised up to `rate` requests a second."""

    rate: float
    measured_rate: float
    rows: list[PlanRow]


class Event(msgspec.Struct, frozen=True):
    """A recovery or a change of membership that happened `times` times from `began` to `last`."""

    kind: str
    what: str
    why: str
    instance: str
    request: str
    began: float
    last: float
    times: int


class Traffic(msgspec.Struct, frozen=True):
    """Over the window, and requests a second and p99 of the time to the first token in steps of `step_s` seconds.

    `goodput` is the share of requests that kept every target; null without targets.
    """

    in_flight: int
    requests_per_s: float
    failed: int
    refused: int
    disaggregated: float | None
    recoveries: int
    goodput: float | None
    step_s: float
    rate_series: list[float]
    ttft_p99_series: list[float | None]


class Live(msgspec.Struct, frozen=True):
    """The whole answer. `headline` says in words why `health` is what it is."""

    version: int
    time: float
    suite: str
    started: float
    window_s: float
    health: Health
    headline: str
    draining: bool
    traffic: Traffic
    pools: list[Pool]
    transfers: Transfers
    latency: Latency
    targets: list[Target]
    plan: Plan | None
    events: list[Event]
