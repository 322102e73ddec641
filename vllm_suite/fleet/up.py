"""What `vllm-suite up` does: plan, start, watch, stop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_suite.fleet.assemble import plan, supervise
from vllm_suite.fleet.console import Console
from vllm_suite.fleet.control import Control
from vllm_suite.fleet.devices import DeviceError
from vllm_suite.fleet.files import explain
from vllm_suite.fleet.keeper import adopt_orphans
from vllm_suite.fleet.launch import Launch, ModelError
from vllm_suite.fleet.launch_front import WITHDRAWN_FILE, router_config
from vllm_suite.fleet.process import PortTaken
from vllm_suite.fleet.restart import NotRestarted, Order, Roll, Unknown
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.state_file import write_atomically
from vllm_suite.fleet.supervisor import StartFailed, Supervisor
from vllm_suite.provenance import provenance
from vllm_suite.roles.predict import PredictError
from vllm_suite.router.auth import KeyFileError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class FolderInUse(RuntimeError):
    """Another fleet keeps its logs and state in the same folder."""


PlanErrors = (DeviceError, ModelError, FileNotFoundError, KeyFileError, PredictError)
StartErrors = (StartFailed, PortTaken, FolderInUse)


def dry_run(spec: FleetSpec, json_file: Path | None = None) -> int:
    """Print the commands that `run` would start. Returns the exit status."""
    try:
        launches = plan(spec)
    except PlanErrors as error:
        print(error, file=sys.stderr)
        return 1
    for launch in launches:
        print(f"# {launch.name}: {launch.url}, log {launch.log}\n{launch.shell()}\n")
    print(f"# {spec.local.log_dir / 'router.yaml'}\n{router_config(spec, launches[:-1])}", end="")
    if json_file is not None:
        _write_json(json_file, launches)
    return 0


def run(spec: FleetSpec, json_file: Path | None = None) -> int:
    """Run the fleet until SIGINT or SIGTERM. Returns the exit status."""
    adopt_orphans()
    try:
        with only_fleet_in(spec.local.log_dir):
            return asyncio.run(_run(spec, json_file))
    except (*PlanErrors, *StartErrors) as error:
        print(error, file=sys.stderr)
        return 1


async def _run(spec: FleetSpec, json_file: Path | None) -> int:
    stop = asyncio.Event()
    with Console() as console:
        supervisor = supervise(spec, console.changed)
        console.watch(supervisor.processes)

        def on_signal() -> None:
            if stop.is_set():
                console.say("asked to stop twice: killing what is left")
                supervisor.kill()
            stop.set()

        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, on_signal)
        async with supervisor:
            starting = asyncio.create_task(supervisor.start())
            stopping = asyncio.create_task(stop.wait())
            await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                console.release()
                router = supervisor.processes[-1].launch
                console.say(f"ready: {router.url}/v1 (logs in {spec.local.log_dir}; Ctrl-C stops the fleet)")
                if json_file is not None:
                    _write_json(json_file, [process.launch for process in supervisor.processes])
                broken = asyncio.create_task(supervisor.broken.wait())
                async with orders(supervisor, console.say):
                    await asyncio.wait([stopping, broken], return_when=asyncio.FIRST_COMPLETED)
                broken.cancel()
            else:
                starting.cancel()
            console.say("stopping" if stop.is_set() else "the fleet cannot serve any more: stopping")
            await supervisor.stop()
        stopping.cancel()
        console.say("stopped; nothing is left running")
    return 1 if supervisor.broken.is_set() else 0


@contextlib.asynccontextmanager
async def orders(supervisor: Supervisor, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Take orders at the control socket. Not every file system has sockets; without one the fleet serves as well."""
    folder = supervisor.local.log_dir
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(Control(folder, functools.partial(_restart, supervisor)))
        except OSError as error:
            say(f"no socket in {folder}, so `vllm-suite restart` does not reach this fleet: {error.strerror or error}")
        yield


async def _restart(
    supervisor: Supervisor, given: Any, say: Callable[[str], None], unwanted: asyncio.Event
) -> dict[str, Any]:
    """`control.Work`: an order of `vllm-suite restart`."""
    try:
        order = Order.model_validate(given)
    except ValidationError as error:
        return {"status": 2, "problem": "; ".join(explain(error, Order)), "restarted": []}
    roll = Roll(supervisor, supervisor.local.log_dir / WITHDRAWN_FILE, order, say, unwanted)
    status, problem = 0, None
    try:
        await roll.run()
    except Unknown as error:
        status, problem = 2, str(error)
    except NotRestarted as error:
        status, problem = 1, str(error)
    return {"status": status, "problem": problem, "restarted": roll.restarted}


def _write_json(path: Path, launches: Sequence[Launch]) -> None:
    processes: list[dict[str, Any]] = [
        {
            "name": launch.name,
            "role": launch.role,
            "url": launch.url,
            "log": str(launch.log),
            "ports": list(launch.ports),
            "command": launch.shell(),
        }
        for launch in launches
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({**provenance(), "processes": processes}, indent=1) + "\n")


@contextlib.contextmanager
def only_fleet_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. Raises FolderInUse where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "fleet.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUse(f"another fleet runs in {folder}; give this one another local.log_dir") from error
        yield
