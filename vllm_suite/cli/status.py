"""`vllm-suite status`: what a fleet is doing."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_suite.cli.arguments import add_fleet_arguments, seconds

if TYPE_CHECKING:
    from vllm_suite.fleet.status import Source

HELP = "show roles, load and KV transfers of a running fleet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_fleet_arguments(parser)
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="S", help="seconds between looks (1)")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--json", metavar="FILE", help="write one snapshot as JSON and end; - for standard output")


def run(args: argparse.Namespace) -> int:
    """0 where every instance is ready, 1 where one is not or nothing answers. Live, it runs until Ctrl-C."""
    from vllm_suite.fleet.keys import FleetKeys
    from vllm_suite.fleet.status import NoFleet, Source, local_router
    from vllm_suite.router.config import Auth

    try:
        keys = FleetKeys.resolve(Auth())
        source = Source(
            router=args.url or local_router(args.log_dir),
            control_key=keys.router_control,
            api_key=keys.upstream,
            log_dir=None if args.url else args.log_dir,
        )
        return asyncio.run(_show(source, args))
    except NoFleet as error:
        print(f"vllm-suite status: {error}", file=sys.stderr)
        return 1


async def _show(source: Source, args: argparse.Namespace) -> int:
    import aiohttp
    from rich.console import Console
    from rich.live import Live

    from vllm_suite.fleet.status import snapshot, table
    from vllm_suite.provenance import provenance

    console = Console(width=None if sys.stdout.isatty() else 160)
    async with aiohttp.ClientSession() as session:
        now = await snapshot(session, source)
        if args.json:
            _write(args.json, json.dumps({**now, **provenance()}, indent=1) + "\n")
        elif args.once or not console.is_terminal:
            console.print(table(now))
        else:
            with Live(table(now), console=console, auto_refresh=False) as live:
                while True:
                    await asyncio.sleep(args.interval)
                    before, now = now, await snapshot(session, source)
                    live.update(table(now, before), refresh=True)
    return 0 if now["ok"] else 1


def _write(target: str, text: str) -> None:
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")
