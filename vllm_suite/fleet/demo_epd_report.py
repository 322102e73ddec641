"""The encoder demo's result: what the instances and the router counted, the table, and report.json."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from vllm_suite.fleet.compare import mismatches, times
from vllm_suite.fleet.replay import Answer
from vllm_suite.fleet.scrape import Samples

_NUMBERS = ("fetches", "fetched_bytes", "fetch_seconds", "kv_bytes", "stage_seconds", "stage_count")


@dataclass(frozen=True)
class Counts:
    """Sums since the start; the difference of two makes a phase's share.

    Attributes:
        encoded: items encoded by each encoder.
        fetched_bytes: encoder outputs read by prefill and decode instances.
        local: items that those encoded themselves, by reason; refused: references they did not use.
        stage_seconds, stage_count: time that the router saw requests spend in the encode stage.
    """

    encoded: Mapping[str, float] = field(default_factory=dict)
    fetches: float = 0.0
    fetched_bytes: float = 0.0
    fetch_seconds: float = 0.0
    local: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, float] = field(default_factory=dict)
    kv_bytes: float = 0.0
    stage_seconds: float = 0.0
    stage_count: float = 0.0

    @staticmethod
    def read(encoders: Mapping[str, Samples], consumers: Sequence[Samples], routers: Sequence[Samples]) -> Counts:
        """From scrapes: encoders by name, then prefill and decode instances, then routers."""

        def total(samples: Sequence[Samples], name: str) -> float:
            return sum(one.total(name) for one in samples)

        return Counts(
            encoded={name: one.total("vllm_suite_ec_encoded_items_total") for name, one in encoders.items()},
            fetches=sum(one.total("vllm_suite_ec_fetches_total", outcome="ok") for one in consumers),
            fetched_bytes=total(consumers, "vllm_suite_ec_fetch_bytes_total"),
            fetch_seconds=total(consumers, "vllm_suite_ec_fetch_seconds_sum"),
            local=_added(one.by("vllm_suite_ec_local_encodes_total", "reason") for one in consumers),
            refused=_added(one.by("vllm_suite_ec_refused_total", "reason") for one in consumers),
            kv_bytes=total(consumers, "vllm:nixl_bytes_transferred_sum"),
            stage_seconds=total(routers, "vllm_suite_router_encode_request_seconds_sum"),
            stage_count=total(routers, "vllm_suite_router_encode_request_seconds_count"),
        )

    @staticmethod
    def sum(parts: Sequence[Counts]) -> Counts:
        """All parts together."""
        return Counts(
            encoded=_added(part.encoded for part in parts),
            local=_added(part.local for part in parts),
            refused=_added(part.refused for part in parts),
            **{name: sum(getattr(part, name) for part in parts) for name in _NUMBERS},
        )

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`."""
        return Counts(
            encoded={name: value - before.encoded.get(name, 0.0) for name, value in self.encoded.items()},
            local=_minus(self.local, before.local),
            refused=_minus(self.refused, before.refused),
            **{name: getattr(self, name) - getattr(before, name) for name in _NUMBERS},
        )


async def settled(read: Callable[[], Awaitable[Counts]], pause_s: float = 0.25, deadline_s: float = 5.0) -> Counts:
    """What is counted once two looks agree, or at the deadline: an engine reports a step's counts a moment after it."""
    until = time.monotonic() + deadline_s
    last = await read()
    while True:
        await asyncio.sleep(pause_s)
        now = await read()
        if now == last or time.monotonic() > until:
            return now
        last = now


@dataclass(frozen=True)
class Phase:
    """One part of the replay. `pictures` counts the media parts of its requests, `encoders` those the router knew."""

    name: str
    encoders: int
    answers: Sequence[Answer]
    pictures: int
    counts: Counts

    @property
    def encoded(self) -> int:
        """Items that an encoder ran for."""
        return int(sum(self.counts.encoded.values()))

    @property
    def encode_ms(self) -> float | None:
        """Mean time of the encode stage per request that had pictures to encode."""
        count = self.counts.stage_count
        return round(1000 * self.counts.stage_seconds / count, 2) if count else None

    def summary(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "name": self.name,
            "encoders": self.encoders,
            "requests": len(self.answers),
            "pictures": self.pictures,
            "encoded": self.encoded,
            "encoded_by": {name: int(n) for name, n in self.counts.encoded.items()},
            "cache_hits": self.pictures - self.encoded,
            "fetches": int(self.counts.fetches),
            "bytes_moved": int(self.counts.fetched_bytes),
            "fetch_ms": round(1000 * self.counts.fetch_seconds, 2),
            "encode_ms": self.encode_ms,
            "local_encodes": {"total": int(sum(self.counts.local.values())), "by_reason": dict(self.counts.local)},
            "refused": dict(self.counts.refused),
            "ttft_ms": times(self.answers)["ttft_ms"],
        }


def make_report(phases: Sequence[Phase], expected: Mapping[int, Answer], facts: dict[str, Any]) -> dict[str, Any]:
    """The report. `expected` holds the single engine's answers by index of the request.

    `ok` is the demo's claim: every output identical; encoder outputs and KV blocks moved by NIXL; nothing encoded
    where it was not meant to be; no picture encoded twice; one encoder used where one was known, else both.
    """
    answers = [answer for phase in phases for answer in phase.answers]
    wrong = mismatches(answers, [expected[answer.index] for answer in answers])
    rows = {phase.name: phase.summary() for phase in phases}
    one, two = rows["one encoder"], rows["two encoders"]
    local = sum(row["local_encodes"]["total"] for row in rows.values())
    failures = {
        "outputs differ": bool(wrong),
        "no encoder output moved": any(
            row["pictures"] > row["cache_hits"] and not row["bytes_moved"] for row in rows.values()
        ),
        "no KV moved": not sum(phase.counts.kv_bytes for phase in phases),
        "pictures were encoded where they were not to be": bool(local),
        "a repeated picture was encoded again": rows["repeated"]["encoded"] > 0,
        "the wrong encoders ran": _busy(one) != 1 or _busy(two) != 2,
    }
    speedup = None
    if one["encode_ms"] and two["encode_ms"]:
        speedup = round(one["encode_ms"] / two["encode_ms"], 3)
    return {
        "ok": not any(failures.values()),
        "failures": [name for name, failed in failures.items() if failed],
        "requests": len(answers),
        "identical": len(answers) - len(wrong),
        "mismatched": len(wrong),
        "mismatches": wrong,
        "phases": list(rows.values()),
        "encode_ms": {"one_encoder": one["encode_ms"], "two_encoders": two["encode_ms"], "speedup": speedup},
        "cache_hits": sum(row["cache_hits"] for row in rows.values()),
        "bytes_moved": sum(row["bytes_moved"] for row in rows.values()),
        "local_encodes": local,
        "kv_bytes_moved": int(sum(phase.counts.kv_bytes for phase in phases)),
        **facts,
    }


def print_report(report: dict[str, Any], stream: TextIO) -> None:
    """The table, then what did not hold and one line per mismatch."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, width=None if stream.isatty() else 120, highlight=False)
    title = f"{report['identical']} of {report['requests']} answers identical to one engine's"
    table = Table(title=title, title_justify="left", show_edge=False)
    for name in ("phase", "requests", "pictures", "encoded", "cache hits", "MB moved", "encoded at prefill"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    table.add_column("encode, ms", justify="right")
    table.add_column("TTFT p50, ms", justify="right")
    for row in report["phases"]:
        numbers = [row[key] for key in ("requests", "pictures", "encoded", "cache_hits")]
        table.add_row(
            row["name"], *(str(number) for number in numbers), f"{row['bytes_moved'] / 1e6:.2f}",
            str(row["local_encodes"]["total"]), _ms(row["encode_ms"]), _ms(row["ttft_ms"]["p50"]),
        )  # fmt: skip
    console.print(table)
    times_ = report["encode_ms"]
    if times_["speedup"]:
        console.print(f"two encoders encode the same pictures {times_['speedup']:.2f} times as fast as one")
    for failure in report["failures"]:
        console.print(f"NOT as claimed: {failure}", markup=False)
    for wrong in report["mismatches"][:10]:
        detail = wrong["error"] or wrong["expected_error"] or f"differs from output token {wrong['position']} on"
        console.print(f"request {wrong['index']}: {detail}", markup=False)


def _busy(row: dict[str, Any]) -> int:
    return sum(1 for count in row["encoded_by"].values() if count)


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _added(parts: Any) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _minus(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {key: value - before.get(key, 0.0) for key, value in now.items() if value != before.get(key, 0.0)}
