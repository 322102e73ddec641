"""What the planner predicts beside what was measured or published, and beside what other tools say of it.

    python benchmarks/planner_validation.py --data DIR --json OUT [--only D A2 L1]

DIR is laid out like the folder that `VLLM_SUITE_DATA` names. A check whose data or tool is not there is listed as not
run, with the reason. The exit status is 0 whatever the verdicts are: misses are results.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from common import arguments, show_table, write_result

from vllm_suite.planner.validation.check import Check

ROOT = Path(__file__).resolve().parent.parent
# Modules of vllm_suite.planner.validation, and the first letters of their checks' ids.
FAMILIES = {
    "distserve": "D",
    "epd": "E",
    "search": "E",
    "apex": "A",
    "measured": "L",
    "aic": "C",
    "cpu": "X",
}


def parser() -> argparse.ArgumentParser:
    parse = arguments(__doc__ or "")
    default = os.environ.get("VLLM_SUITE_DATA") or str(ROOT.parent / "shared" / "data")
    parse.add_argument("--data", type=Path, default=Path(default), metavar="DIR", help="default: VLLM_SUITE_DATA")
    parse.add_argument("--only", nargs="+", default=[], metavar="ID", help="first letters of ids: D, A2, ...")
    parse.add_argument(
        "--apex-comm",
        type=Path,
        default=Path(os.environ["VLLM_SUITE_APEX_COMM"]) if "VLLM_SUITE_APEX_COMM" in os.environ else None,
        metavar="DIR",
        help="profile/comm/H100-SXM-80GB of microsoft/apex_plus, for A5; default: VLLM_SUITE_APEX_COMM",
    )
    return parse


def run(family: str, data: Path, only: list[str], **more: Any) -> Iterator[Check]:
    """The checks of one module whose ids are wanted."""
    checks: Callable[..., Iterator[Check]] = import_module(f"vllm_suite.planner.validation.{family}").checks
    for check in checks(data, **more):
        if not only or any(check.id.startswith(prefix) for prefix in only):
            yield check


def text(value: Any) -> str:
    """A figure as the table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(text(each) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(each)}" for name, each in value.items())
    return str(value)


def short(value: str, width: int) -> str:
    return value if len(value) <= width else value[: width - 1] + "…"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    load = os.getloadavg()
    if not args.data.is_dir():
        print(f"planner_validation: no folder {args.data}; name it by --data or VLLM_SUITE_DATA", file=sys.stderr)
        return 2
    found: list[Check] = []
    seconds: dict[str, float] = {}
    for family, letter in FAMILIES.items():
        if args.only and not any(prefix.startswith(letter) for prefix in args.only):
            continue
        begin = time.process_time()
        more = {"comm": args.apex_comm} if family == "apex" else {}
        for check in run(family, args.data, args.only, **more):
            found.append(replace(check, others=dict(check.others)))
            print(f"{check.id}: {check.what}: {check.verdict}", file=sys.stderr, flush=True)
        seconds[family] = time.process_time() - begin
    show_table(
        "predicted beside measured or published",
        ["id", "what", "ours", "reference", "error", "tolerance", "verdict", "others"],
        [
            [
                check.id,
                short(check.what, 60),
                short(text(check.ours), 28),
                short(text(check.reference), 28),
                text(check.error),
                check.tolerance,
                check.verdict,
                short(text(check.others), 60),
            ]
            for check in found
        ],
    )
    for check in found:
        if check.note:
            print(f"{check.id} {short(check.what, 60)}: {check.note}")
    verdicts = Counter(check.verdict for check in found)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or "nothing was asked for")
    body = {"checks": [check.as_json() for check in found], "verdicts": dict(verdicts), "cpu_seconds": seconds}
    write_result(args.json, "planner_validation", body, load)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
