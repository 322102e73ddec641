"""`vllm-suite top`: the live page in a terminal, from the same state of the router."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_suite.cli.arguments import add_fleet_arguments, seconds

if TYPE_CHECKING:
    from vllm_suite.fleet.live import Asked

HELP = "watch a fleet as its router sees it: pools, transfers, latency, recoveries"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_fleet_arguments(parser)
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="S", help="seconds between looks (1)")
    parser.add_argument("--once", action="store_true", help="print once and end; so it does where it is piped")
    parser.add_argument("--json", metavar="FILE", help="write the state as JSON and end; - for standard output")


def run(args: argparse.Namespace) -> int:
    """0 where the fleet serves (q or Ctrl-C ends it), 1 where it does not or the router gives no answer."""
    from vllm_suite.fleet.keys import FleetKeys
    from vllm_suite.fleet.live import Asked
    from vllm_suite.fleet.status import NoFleet, local_router
    from vllm_suite.router.auth import KeyFileError
    from vllm_suite.router.config import Auth

    try:
        keys = FleetKeys.resolve(Auth())
        router = args.url or local_router(args.log_dir)
        return asyncio.run(_show(Asked(router, keys.control or keys.client), args))
    except (NoFleet, KeyFileError) as error:
        print(f"vllm-suite top: {error}", file=sys.stderr)
        return 1


async def _show(asked: Asked, args: argparse.Namespace) -> int:
    import json

    import aiohttp
    import msgspec
    from rich.console import Console

    from vllm_suite.fleet.live import look, screen, watch
    from vllm_suite.provenance import provenance

    async with aiohttp.ClientSession() as session:
        console = Console(width=None if sys.stdout.isatty() else 120)
        if not (args.json or args.once) and console.is_terminal:
            return await watch(session, asked, console, args.interval)
        state = await look(session, asked)
        if args.json:
            text = json.dumps({**msgspec.to_builtins(state), **provenance()}, indent=1) + "\n"
            if args.json == "-":
                sys.stdout.write(text)
            else:
                await asyncio.to_thread(Path(args.json).write_text, text, encoding="utf-8")
        else:
            console.print(screen(state))
        return 0 if state.health != "down" else 1
