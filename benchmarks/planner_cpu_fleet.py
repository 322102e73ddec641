"""Fleets for `planner_cpu.py`, an engine a core: two behind a router, or one that prefills and one that decodes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.supervisor import Supervisor, supervise

Kind = Literal["colocated", "disaggregated"]
SERVED = "calibrated"
ENV_LENGTHS = "PLANNER_CPU_LENGTHS"  # as `planner_eos` reads it, which imports vLLM
HERE = Path(__file__).resolve().parent
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Running:
    """A fleet that takes requests.

    Attributes:
        url: of the router.
        direct: of its first engine.
        shared: processes that stand beside the engines: the router, and this one, which is the client.
    """

    url: str
    direct: str
    shared: tuple[int, ...]

    def shared_cpu_s(self) -> float:
        """CPU seconds that they have used."""
        return sum(_cpu_s(pid) for pid in self.shared)


def spec(kind: Kind, model: Path, engine: dict[str, Any], lengths: Path, folder: Path) -> FleetSpec:
    """The fleet's file."""
    first = free_ports(5)
    pools: dict[str, Any] = {"any": {"replicas": 2}} if kind == "colocated" else {"prefill": {}, "decode": {}}
    args = ["--logits-processors", "planner_eos:EndAtLength", "--disable-uvicorn-access-log"]
    return FleetSpec.model_validate(
        {
            "name": kind,
            "model": str(model),
            "served_model_name": SERVED,
            "engine": {**engine, "enforce_eager": True, "generation_config": "vllm", "args": args},
            "env": {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE), ENV_LENGTHS: str(lengths)},
            "pools": pools,
            "router": {"port": first, "disaggregation": {"min_prompt_tokens": 0, "max_cached_fraction": 1.0}},
            "local": {
                "first_port": first + 1,
                "first_side_channel_port": first + 3,
                "device": "cpu",
                "start_timeout": "300s",
                "log_dir": str(folder / kind),
            },
        }
    )


@contextlib.asynccontextmanager
async def running(fleet: FleetSpec) -> AsyncIterator[Running]:
    """The fleet, pinned: each engine's processes on a core of its own.

    With both engines colocated the router and the client may use either core; disaggregated they stay on the core of
    the prefill engine, so that what they take is taken from one engine, whose share is known.
    """
    async with supervise(fleet) as supervisor:
        await supervisor.start()
        *engines, router = supervisor.processes
        cores = sorted(os.sched_getaffinity(0))
        with _pinned(supervisor, cores, shared_on_first=fleet.name == "disaggregated"):
            yield Running(router.launch.url, engines[0].launch.url, (*router.pids(), os.getpid()))


@contextlib.contextmanager
def _pinned(supervisor: Supervisor, cores: Sequence[int], shared_on_first: bool) -> Iterator[None]:
    *engines, router = supervisor.processes
    for core, process in zip(cores, engines, strict=False):
        for pid in process.pids():
            _pin(pid, {core})
    before = os.sched_getaffinity(0)
    if shared_on_first:
        for pid in (*router.pids(), os.getpid()):
            _pin(pid, {cores[0]})
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
