"""``vllm-suite doctor``: what is installed here, and which plugins can work."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_suite.catalog import ENV_PLUGINS, PLUGINS, SelectionError, parse_selection

if TYPE_CHECKING:
    from vllm_suite.compat.diagnosis import Diagnosis

HELP = "check this machine and say which plugins can work, and why others cannot"
DEFAULT_DEADLINE_S = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``doctor``."""
    parser.add_argument(
        "--plugins",
        metavar="NAME[,NAME...]",
        help=f"plugins that must work for exit status 0 (default: {ENV_PLUGINS})",
    )
    parser.add_argument(
        "--port", type=int, action="append", default=[], metavar="PORT", help="a TCP port that must be free; repeatable"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=DEFAULT_DEADLINE_S,
        metavar="SECONDS",
        help=f"end a library that does not load by then (default: {DEFAULT_DEADLINE_S:g})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis. 0 where nothing failed and every requested plugin can work, 2 for an unknown name."""
    text = os.environ.get(ENV_PLUGINS, "") if args.plugins is None else args.plugins
    try:
        requested = _requested(text)
    except SelectionError as error:
        sys.stderr.write(f"vllm-suite doctor: error: {error}\n")
        return 2
    from vllm_suite.compat.diagnosis import diagnose

    diagnosis = diagnose(requested, args.port, args.deadline)
    (_print_tables if sys.stdout.isatty() else _print_lines)(diagnosis)
    if args.json is not None:
        _write_json(args.json, requested, diagnosis)
    return 0 if diagnosis.ok else 1


def _requested(text: str) -> tuple[str, ...]:
    """Names to judge. One that has not landed is a fair question here, an unknown one is not."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if any(name not in PLUGINS for name in names):
        parse_selection(text)  # raises, with the known names
    return names


Row = tuple[str, str, str]  # status, what, found


def _rows(diagnosis: Diagnosis) -> tuple[list[Row], list[Row]]:
    checks: list[Row] = [(check.status, check.name, check.detail) for check in diagnosis.checks]
    plugins: list[Row] = []
    for verdict in diagnosis.verdicts:
        bad = "fail" if verdict.requested else "-"
        detail = PLUGINS[verdict.plugin].summary if verdict.usable else "; ".join(verdict.reasons)
        plugins.append(("ok" if verdict.usable else bad, verdict.plugin, detail))
        if verdict.usable:
            plugins += [("", f"{verdict.plugin}: {part}", state) for part, state in verdict.parts.items()]
    return checks, plugins


def _print_lines(diagnosis: Diagnosis) -> None:
    checks, plugins = _rows(diagnosis)
    for status, name, detail in checks:
        print(f"{status:4}  {name}: {detail}")
    for status, name, detail in plugins:
        print(f"{status:4}  plugin {name}: {detail}")
    print(_summary(diagnosis))


def _print_tables(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    console = Console()

    def show(title: str, rows: Iterable[Row]) -> None:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("", "what", "found"):
            table.add_column(column)
        for status, name, detail in rows:
            table.add_row(Text(status, style=colors.get(status, "dim")), Text(name), Text(detail))
        console.print(table)

    checks, plugins = _rows(diagnosis)
    show("machine", checks)
    show("plugins", plugins)
    console.print(Text(_summary(diagnosis), style="green" if diagnosis.ok else "red"))


def _summary(diagnosis: Diagnosis) -> str:
    if diagnosis.ok:
        usable = [verdict.plugin for verdict in diagnosis.verdicts if verdict.usable]
        return f"healthy; plugins that can be used here: {', '.join(usable) or 'none'}"
    failed = [check.name for check in diagnosis.checks if check.status == "fail"]
    failed += [f"plugin {v.plugin}" for v in diagnosis.verdicts if v.requested and not v.usable]
    return f"not healthy: {', '.join(failed)}"


def _write_json(path: Path, requested: tuple[str, ...], diagnosis: Diagnosis) -> None:
    from vllm_suite.provenance import provenance

    result = {
        "ok": diagnosis.ok,
        "requested": list(requested),
        "checks": [asdict(check) for check in diagnosis.checks],
        "plugins": [asdict(verdict) for verdict in diagnosis.verdicts],
        "probes": diagnosis.answers,
        "provenance": provenance(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
