"""The demo's result: the table on the screen and what is written to report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from vllm_suite.fleet.compare import mismatches, times
from vllm_suite.fleet.replay import Answer
from vllm_suite.fleet.scrape import Samples

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Moved:
    """What the decode instances and the router counted; the difference of two makes a replay's share."""

    kv_bytes: float = 0.0
    transfers: float = 0.0
    recomputes: dict[str, float] = field(default_factory=dict)
    refused: dict[str, float] = field(default_factory=dict)
    recoveries: dict[str, float] = field(default_factory=dict)
    decisions: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def read(decode: Sequence[Samples], router: Samples) -> Moved:
        """From scrapes of all decode instances and of the router."""
        return Moved(
            kv_bytes=sum(samples.total("vllm:nixl_bytes_transferred_sum") for samples in decode),
            transfers=sum(samples.total("vllm:nixl_xfer_time_seconds_count") for samples in decode),
            recomputes=_sum(samples.by("vllm_suite_kv_recomputes_total", "reason") for samples in decode),
            refused=_sum(samples.by("vllm_suite_kv_refused_total", "reason") for samples in decode),
            recoveries=router.by("vllm_suite_router_recoveries_total", "step"),
            decisions=router.by("vllm_suite_router_decisions_total", "reason"),
            pictures=router.by("vllm_suite_router_encode_items_total", "outcome"),
        )

    def since(self, before: Moved) -> Moved:
        """What was counted after `before`."""
        return Moved(
            kv_bytes=self.kv_bytes - before.kv_bytes,
            transfers=self.transfers - before.transfers,
            recomputes=_minus(self.recomputes, before.recomputes),
            refused=_minus(self.refused, before.refused),
            recoveries=_minus(self.recoveries, before.recoveries),
            decisions=_minus(self.decisions, before.decisions),
            pictures=_minus(self.pictures, before.pictures),
        )


def make_report(
    answers: Sequence[Answer],
    expected: Sequence[Answer],
    moved: Moved,
    facts: dict[str, Any],
    shown: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """The report. `ok` is the demo's claim: every output identical, and KV blocks moved through NIXL.

    `shown` has the number of pictures of each request that has any; the claim is then also that prefill encoded every
    one of them. `ttft_ms` and `tpot_ms` hold p50, p99 and mean for `disaggregated` and `single`; `facts` are added as
    given.
    """
    shown = shown or {}
    wrong = mismatches(answers, expected)
    fleet, single = times(answers), times(expected)
    return {
        "ok": bool(answers)
        and not wrong
        and moved.transfers > 0
        and moved.kv_bytes > 0
        and moved.pictures.get("local", 0) == sum(shown.values()),
        "requests": len(answers),
        "identical": len(answers) - len(wrong),
        "mismatched": len(wrong),
        "mismatches": wrong,
        "pictures": _pictures(shown, answers, wrong, moved),
        "kv_bytes_moved": int(moved.kv_bytes),
        "nixl_transfers": int(moved.transfers),
        "recomputes": {"total": int(sum(moved.recomputes.values())), "by_reason": moved.recomputes},
        "refused_references": moved.refused,
        "router_recoveries": moved.recoveries,
        "router_decisions": moved.decisions,
        "ttft_ms": {"disaggregated": fleet["ttft_ms"], "single": single["ttft_ms"]},
        "tpot_ms": {"disaggregated": fleet["tpot_ms"], "single": single["tpot_ms"]},
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "output_tokens": sum(len(answer.token_ids) for answer in answers),
        **facts,
    }


def _pictures(
    shown: Mapping[int, int], answers: Sequence[Answer], wrong: Sequence[Mapping[str, Any]], moved: Moved
) -> dict[str, Any]:
    if not shown:
        return {"requests": 0, "left_out": "the model takes no pictures"}
    return {
        "requests": len(shown),
        "pictures": sum(shown.values()),
        "identical": len(shown) - sum(row["index"] in shown for row in wrong),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers if answer.index in shown),
        "encoded_at_prefill": int(moved.pictures.get("local", 0)),
    }


def print_report(report: dict[str, Any], stream: TextIO) -> None:
    """The table, and one line per mismatch."""
    from rich.console import Console

    console = Console(file=stream, width=None if stream.isatty() else 100, highlight=False)
    console.print(_table(report))
    if report["nixl_transfers"] < report["requests"]:
        for key in ("router_decisions", "router_recoveries", "refused_references", "restarts"):
            if report.get(key):
                console.print(f"{key}: {report[key]}", markup=False)
    for wrong in report["mismatches"][:10]:
        detail = wrong["error"] or wrong["expected_error"] or f"differs from output token {wrong['position']} on"
        console.print(f"request {wrong['index']}: {detail}", markup=False)
    if len(report["mismatches"]) > 10:
        console.print(f"and {len(report['mismatches']) - 10} more (see the report)")


def _table(report: dict[str, Any]) -> Table:
    from rich.table import Table

    pictures = report["pictures"]
    of_trace = report["requests"] - pictures["requests"]
    title = f"{of_trace} requests of {report['trace']['name']}"
    table = Table(title=title, title_justify="left", show_edge=False)
    table.add_column("")
    table.add_column("prefill + decode", justify="right")
    table.add_column("one engine", justify="right")
    table.add_row("identical outputs", f"{report['identical']} of {report['requests']}", "")
    if pictures["requests"]:
        table.add_row("of those with pictures", f"{pictures['identical']} of {pictures['requests']}", "")
        table.add_row("pictures encoded at prefill", f"{pictures['encoded_at_prefill']} of {pictures['pictures']}", "")
    else:
        table.add_row("of those with pictures", f"none: {pictures['left_out']}", "")
    for key, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
        for q in ("p50", "p99"):
            both = [report[key][side][q] for side in ("disaggregated", "single")]
            table.add_row(f"{label} {q}, ms", *("" if value is None else f"{value:.1f}" for value in both))
    table.add_row("KV bytes moved", f"{report['kv_bytes_moved']:,}", "")
    table.add_row("NIXL transfers", f"{report['nixl_transfers']:,}", "")
    reasons = ", ".join(f"{k} {v:g}" for k, v in report["recomputes"]["by_reason"].items())
    table.add_row("recomputes", f"{report['recomputes']['total']}" + (f" ({reasons})" if reasons else ""), "")
    return table


def _sum(parts: Any) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def _minus(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {key: value - before.get(key, 0.0) for key, value in now.items() if value != before.get(key, 0.0)}
