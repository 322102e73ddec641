"""`vllm-suite roles`: see the roles of a fleet, set one, or run the controller."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.cli.arguments import add_fleet_arguments, seconds

if TYPE_CHECKING:
    from vllm_suite.roles.client import Access

_OLDER = "asked again without give_back, which this instance does not know: it first serves what waits on it"

HELP = "show and switch the roles of instances, by hand or by load"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    status = verbs.add_parser("status", help="role, phase and queue of each instance")
    set_ = verbs.add_parser("set", help="switch one instance, and wait until it has ended")
    set_.add_argument("instance", help="instance id, as status shows it")
    set_.add_argument("role", choices=("encode", "prefill", "decode", "any"))
    set_.add_argument("--timeout", type=seconds, default=200.0, metavar="S", help="seconds to wait (200)")
    control = verbs.add_parser("control", help="follow the load until interrupted")
    control.add_argument("fleet", type=Path, help="fleet file; its section `roles` says how")
    control.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    control.add_argument(
        "--lease", metavar="NAME", help="of a Kubernetes Lease in this pod's namespace: of several controllers one acts"
    )
    control.add_argument(
        "--scale", metavar="KIND/NAME", help="deployment/NAME or lws/NAME of pools.any, whose size `roles.scale` is for"
    )
    control.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus series there")
    control.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="address for them (127.0.0.1)")
    for verb in (status, set_, control):
        add_fleet_arguments(verb)


def run(args: argparse.Namespace) -> int:
    """0 where what was asked for is true: a `set` that did not switch gives 1."""
    from vllm_suite.fleet.files import FleetFileError
    from vllm_suite.fleet.status import NoFleet
    from vllm_suite.kube.client import NotInCluster
    from vllm_suite.roles.client import NoAnswer
    from vllm_suite.roles.predict import PredictError
    from vllm_suite.router.auth import KeyFileError

    action = {"status": _status, "set": _set, "control": _control}[args.action]
    try:
        return asyncio.run(action(args))
    except (FleetFileError, KeyFileError, PredictError, NotInCluster, ValueError) as error:
        for line in str(error).splitlines():
            print(f"vllm-suite roles: {line}", file=sys.stderr)
        return 2
    except (NoFleet, NoAnswer, OSError) as error:
        print(f"vllm-suite roles: {error}", file=sys.stderr)
        return 1


def _access(args: argparse.Namespace) -> Access:
    from vllm_suite.fleet.files import load_fleet
    from vllm_suite.fleet.keys import FleetKeys
    from vllm_suite.fleet.status import local_router
    from vllm_suite.roles.client import Access
    from vllm_suite.router.config import Auth

    auth, log_dir = Auth(), args.log_dir
    if args.action == "control":
        spec = load_fleet(args.fleet)
        auth, log_dir = spec.router.auth, spec.local.log_dir
    keys = FleetKeys.resolve(auth)
    return Access(args.url or local_router(log_dir), keys.router_control, keys.instance_control)


async def _status(args: argparse.Namespace) -> int:
    import aiohttp
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vllm_suite.roles.client import look

    access = _access(args)
    async with aiohttp.ClientSession() as session:
        fleet, troubles = await look(session, access)
    table = Table(title=access.router, title_justify="left", show_edge=False)
    for name in ("instance", "role", "phase", "epoch", "ready", "running", "waiting", "can be"):
        table.add_column(name)
    for one in fleet:
        numbers = (str(one.role_epoch), "yes" if one.ready else "no", str(one.running), str(one.queue))
        table.add_row(escape(one.instance_id), one.role, escape(one.phase), *numbers, ", ".join(one.can))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for trouble in troubles:
        print(f"vllm-suite roles: {trouble}", file=sys.stderr)
    return 0 if fleet and not troubles and all(one.ready for one in fleet) else 1


async def _set(args: argparse.Namespace) -> int:
    import aiohttp

    from vllm_suite.roles.client import NoAnswer, ended, look, switch
    from vllm_suite.roles.seen import others_take

    access = _access(args)
    async with aiohttp.ClientSession() as session:
        fleet, _ = await look(session, access)
        found = [one for one in fleet if one.instance_id == args.instance]
        if not found:
            known = ", ".join(one.instance_id for one in fleet)
            raise NoAnswer(f"the router knows no instance {args.instance}; it knows: {known or 'none'}")
        [one] = found
        give_back = others_take(fleet, one)
        answer = await switch(session, one, args.role, access.instance_key, give_back, lambda: print(_OLDER))
        if answer.get("outcome") != "begun":
            print(f"{one.instance_id}: {answer.get('outcome', 'refused')}: {answer.get('error')}")
            return 0 if answer.get("outcome") == "noop" else 1
        now = await ended(session, one, answer, access.instance_key, args.timeout)
    last: dict[str, Any] = now["last"]
    seconds = ", ".join(f"{phase} {took:.3f} s" for phase, took in last["seconds"].items())
    changed = ", ".join(f"{name} {old} to {new}" for name, (old, new) in last["changed"].items())
    print(f"{one.instance_id}: {last['outcome']}: {one.role} to {args.role}; {seconds}")
    print(f"limits changed: {changed or 'none'}; verified: {', '.join(last['verified']) or 'nothing'}")
    if last.get("given_back"):
        print("sent back to the router: " + ", ".join(f"{n} to {stage}" for stage, n in last["given_back"].items()))
    if last["outcome"] != "switched":
        print(f"it is {now['role']} and {now['phase']}: {last['reason']}")
    return 0 if last["outcome"] == "switched" else 1


async def _control(args: argparse.Namespace) -> int:
    import signal
    import socket

    import aiohttp
    from prometheus_client import CollectorRegistry, start_http_server

    from vllm_suite.fleet.files import FleetFileError, load_fleet
    from vllm_suite.kube.client import Kube
    from vllm_suite.roles.controller import Controller
    from vllm_suite.roles.follow import rule_of
    from vllm_suite.roles.lease import Lease
    from vllm_suite.roles.scale import Target, Workload

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    access, fleet = _access(args), load_fleet(args.fleet)
    registry = CollectorRegistry()
    if (args.scale is None) != (fleet.roles.scale is None):
        raise FleetFileError("--scale and the section roles.scale go together: one names the workload, one the budget")
    kube = Kube.in_cluster() if args.lease or args.scale else None
    lease = Lease(kube, args.lease, socket.gethostname()) if kube is not None and args.lease else None
    scale = None
    if kube is not None and args.scale:
        pool = fleet.pools.any
        gpus = fleet.engine.overridden_by(pool.engine).gpus if pool is not None else 1
        scale = Workload(kube, Target.parse(args.scale)), gpus
    controller = Controller(fleet.roles, access, registry, rule_of(fleet), args.dry_run, lease, scale)
    if args.metrics_port is not None:
        try:
            start_http_server(args.metrics_port, addr=args.metrics_host, registry=registry)
        except (OSError, OverflowError) as error:
            where = f"{args.metrics_host}:{args.metrics_port}"
            raise OSError(f"series cannot be served at {where} (--metrics-host, --metrics-port): {error}") from None
    try:
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(controller.run(session))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await task
    finally:
        if kube is not None:
            await kube.close()
    return 0
