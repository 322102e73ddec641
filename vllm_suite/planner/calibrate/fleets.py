"""Fleets to measure on: engines of a kind behind the router, or one that prefills and one that decodes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_suite.fleet.assemble import supervise
from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.supervisor import Supervisor

Kind = Literal["colocated", "disaggregated"]
KINDS: tuple[Kind, ...] = ("colocated", "disaggregated")
SERVED = "calibrated"
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Running:
    """A fleet that takes requests.

    Attributes:
        url: of the router.
        direct: of its first engine.
        answering: of its last engine, which decodes.
        shared: processes that stand beside the engines: the router, and this one, which is the client.
        fronts: of each engine the process that speaks HTTP.
        pinned: whether each engine's processes share cores of their own.
    """

    url: str
    direct: str
    answering: str
    shared: tuple[int, ...]
    fronts: tuple[int, ...] = ()
    pinned: bool = False

    def front_cpu_s(self) -> list[float]:
        """CPU seconds that each engine's HTTP server has used."""
        return [_cpu_s(pid) for pid in self.fronts]

    def shared_cpu_s(self) -> float:
        """CPU seconds that they have used."""
        return sum(_cpu_s(pid) for pid in self.shared)


def spec(
    kind: Kind,
    model: str,
    engine: Mapping[str, Any],
    folder: Path,
    *,
    device: Literal["cpu", "gpu"],
    engines: int = 2,
    threads: int = 1,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> FleetSpec:
    """The fleet's file: `engines` alike behind the router, or one of each role and every prompt handed over.

    Raises:
        ValueError: an engine argument that a fleet file has no key for.
    """
    first = free_ports(1 + 2 * engines + 2)
    pools: dict[str, Any] = {"any": {"replicas": engines}} if kind == "colocated" else {"prefill": {}, "decode": {}}
    on_cpu = {"enforce_eager": True} if device == "cpu" else {}
    local = {"HF_HUB_OFFLINE": "1"} if Path(model).is_dir() else {}
    return FleetSpec.model_validate(
        {
            "name": kind,
            "model": model,
            "served_model_name": SERVED,
            "engine": {**on_cpu, **engine, "generation_config": "vllm", "args": list(args)},
            "env": {**local, **(env or {})},
            "pools": pools,
            "router": {"port": first, "disaggregation": {"min_prompt_tokens": 0, "max_cached_fraction": 1.0}},
            "local": {
                "first_port": first + 1,
                "first_side_channel_port": first + 1 + max(2, engines),
                "device": device,
                "cpu_threads": threads,
                "log_dir": str(folder / kind),
            },
        }
    )


@contextlib.asynccontextmanager
async def running(fleet: FleetSpec) -> AsyncIterator[Running]:
    """The fleet, on CPU pinned where there are cores enough: each engine's processes on cores of their own.

    With engines colocated the router and the client may use any core. Disaggregated they stay on the cores of the
    prefill engine, so that what they take is taken from one engine, whose share is known.
    """
    async with supervise(fleet) as supervisor:
        await supervisor.start()
        *engines, router = supervisor.processes
        urls = router.launch.url, engines[0].launch.url, engines[-1].launch.url
        fronts = tuple(process.pids()[0] for process in engines)
        cores, threads = sorted(os.sched_getaffinity(0)), fleet.local.cpu_threads
        pinned = fleet.local.device == "cpu" and len(cores) >= threads * len(engines)
        found = Running(*urls, (*router.pids(), os.getpid()), fronts, pinned)
        if not pinned:
            yield found
            return
        shares = [set(cores[at * threads : (at + 1) * threads]) for at in range(len(engines))]
        with _pinned(supervisor, shares, shared_on_first=fleet.pools.prefill is not None):
            yield found


@contextlib.contextmanager
def _pinned(supervisor: Supervisor, shares: Sequence[set[int]], shared_on_first: bool) -> Iterator[None]:
    *engines, router = supervisor.processes
    for cores, process in zip(shares, engines, strict=True):
        for pid in process.pids():
            _pin(pid, cores)
    before = os.sched_getaffinity(0)
    if shared_on_first:
        for pid in (*router.pids(), os.getpid()):
            _pin(pid, shares[0])
    try:
        yield
    finally:
        _pin(os.getpid(), before)


def _pin(pid: int, cores: set[int]) -> None:
    """Every thread there is; later ones inherit it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


def _cpu_s(pid: int) -> float:
    if pid == os.getpid():
        return time.process_time()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * _TICK_S
