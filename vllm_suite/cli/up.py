"""`vllm-suite up`: run the fleet of a file on this machine until it is told to stop."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "start the instances and the router of a fleet file on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("fleet", type=Path, metavar="FLEET.yaml", help="the fleet file (see docs/fleet.md)")
    parser.add_argument("--dry-run", action="store_true", help="print the exact commands and start nothing")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="in place of local.log_dir")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write commands and addresses there once all is ready"
    )


def run(args: argparse.Namespace) -> int:
    """0 after a stop that was asked for, 1 where the fleet could not be started or kept, 2 on a wrong file."""
    from vllm_suite.fleet.files import FleetFileError, load_fleet

    try:
        spec = load_fleet(args.fleet)
    except FleetFileError as error:
        print(error, file=sys.stderr)
        return 2
    if args.log_dir is not None:
        spec = spec.model_copy(update={"local": spec.local.model_copy(update={"log_dir": args.log_dir})})
    from vllm_suite.fleet import up

    return up.dry_run(spec, args.json) if args.dry_run else up.run(spec, args.json)
