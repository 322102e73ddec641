"""`vllm-suite restart`: new processes for a running fleet, one instance at a time, without a lost request."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_suite.cli.arguments import add_log_dir, seconds

HELP = "restart instances of a running fleet one by one, after they have finished their work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="instances, for example fleet-prefill-0")
    parser.add_argument("--all", action="store_true", help="every instance of the fleet")
    add_log_dir(parser)
    parser.add_argument(
        "--finish", type=seconds, default=300.0, metavar="S", help="seconds that an instance may take to finish (300)"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="also where no other instance does that work; work that is not finished in time is cut off",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was restarted, and how long it took")


def run(args: argparse.Namespace) -> int:
    """0 where all that was named serves again, 1 where something was refused or failed, 2 on bad arguments."""
    from vllm_suite.fleet.control import NoFleet, give

    if bool(args.names) == args.all:
        print("vllm-suite restart: give names of instances, or --all", file=sys.stderr)
        return 2
    order = {"names": args.names, "force": args.force, "finish_s": args.finish}
    end: dict[str, Any] = {"status": 1, "problem": None, "restarted": []}
    try:
        for answer in give(args.log_dir, order):
            if "say" in answer:
                print(answer["say"], flush=True)
            end = answer.get("end", end)
    except NoFleet as error:
        end["problem"] = str(error)
    if args.json is not None:
        from vllm_suite.provenance import provenance

        args.json.write_text(json.dumps({**end, **provenance()}, indent=1) + "\n", encoding="utf-8")
    if end["problem"]:
        print(f"vllm-suite restart: {end['problem']}", file=sys.stderr)
    return int(end["status"])
