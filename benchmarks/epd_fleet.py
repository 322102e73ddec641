"""The processes that bench_epd measures: a fleet with three routers over parts of it, and a plain engine beside it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_suite.fleet.assemble import supervise
from vllm_suite.fleet.demo_epd_report import Counts
from vllm_suite.fleet.demo_epd_spec import EpdOptions, epd_fleet, router_over
from vllm_suite.fleet.demo_spec import free_ports, single_engine
from vllm_suite.fleet.keeper import adopt_orphans
from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.process import FleetProcess
from vllm_suite.fleet.scrape import Samples, scrape
from vllm_suite.fleet.supervisor import Supervisor

if TYPE_CHECKING:
    import aiohttp

KINDS = ("monolithic", "E+PD", "1E+P+D", "2E+P+D")
_ENCODERS = {"monolithic": 0, "E+PD": 1, "1E+P+D": 1, "2E+P+D": 2}


@dataclass(frozen=True)
class Systems:
    """Where each kind takes requests, and all instances behind them."""

    urls: dict[str, str]
    instances: tuple[Launch, ...]
    routers: tuple[Launch, ...]
    encoders: tuple[FleetProcess, ...]

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that each encoder's processes have used."""
        return {process.name: sum(map(_cpu_s, process.pids())) for process in self.encoders}

    async def counts(self, session: aiohttp.ClientSession) -> Counts:
        """Sums over the fleet. Raises RuntimeError where a process gives no metrics."""
        known: dict[str, Samples] = {}
        for launch in (*self.instances, *self.routers):
            samples = await scrape(session, launch.url)
            if samples is None:
                raise RuntimeError(f"{launch.name} gives no metrics; see {launch.log}")
            known[launch.name] = samples
        encoders = {one.name: known[one.name] for one in self.instances if one.role == "encode"}
        consumers = [known[one.name] for one in self.instances if one.role != "encode"]
        return Counts.read(encoders, consumers, [known[one.name] for one in self.routers])


def encoders_of(kind: str) -> int:
    """Encoder instances that a kind uses."""
    return _ENCODERS[kind]


@contextlib.asynccontextmanager
async def systems(folder: Path, model: Path, images: int) -> AsyncIterator[Systems]:
    """Start everything; all of it lives at once, so that the kinds can take turns. Errors as of the fleet.

    Args:
        images: most images of one request.
    """
    adopt_orphans()
    fleet = epd_fleet(EpdOptions(model=str(model), pictures=max(8, images), folder=folder), str(model))
    port = free_ports(6)
    plain_local = fleet.local.model_copy(
        update={"first_port": port + 2, "first_side_channel_port": port + 3, "log_dir": folder / "plain"}
    )
    plain, single = single_engine(fleet.model_copy(update={"local": plain_local}))
    async with contextlib.AsyncExitStack() as stack:
        own = await stack.enter_async_context(supervise(fleet, _say))
        await own.start()
        *instances, both = [process.launch for process in own.processes]
        first, _, prefill, decode = instances
        urls, routers = {"2E+P+D": both.url}, [both]
        parts: dict[str, Sequence[Launch]] = {"E+PD": (first, decode), "1E+P+D": (first, prefill, decode)}
        for index, (kind, part) in enumerate(parts.items()):
            spec, router = router_over(fleet, part, kind.lower().replace("+", "-"), port + index)
            await (await stack.enter_async_context(Supervisor([router], spec.local, _say, members=len(part)))).start()
            urls[kind] = router.url
            routers.append(router)
        await (await stack.enter_async_context(Supervisor(single, plain.local, _say))).start()
        urls["monolithic"] = single[0].url
        yield Systems(urls, tuple(instances), tuple(routers), tuple(own.processes[:2]))


def idle_cores(seconds: float = 0.5) -> float:
    """Cores that did nothing for so long, by /proc/stat."""
    before, began = _idle_ticks(), time.monotonic()
    time.sleep(seconds)

    return (_idle_ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)


def _cpu_s(pid: int) -> float:
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it ended
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _idle_ticks() -> int:
    words = Path("/proc/stat").read_text().splitlines()[0].split()
    return int(words[4]) + int(words[5])


def _say(process: FleetProcess, why: str) -> None:
    print(f"{process.name}: {process.state}" + (f" {why}" if why else ""), flush=True)
