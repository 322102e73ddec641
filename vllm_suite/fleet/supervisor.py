"""Keeps a fleet's processes running: staggered start, restart with back-off, a stop that leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.process import Ended, FleetProcess, PortTaken, State, ask, check_ports, ready_members
from vllm_suite.fleet.spec import LocalSpec
from vllm_suite.fleet.state_file import write_state

if TYPE_CHECKING:
    import aiohttp

_KNOWN_S = 30.0
_LOOK_S = 0.1
_LIGHT = ("router", "controller")
OnChange = Callable[[FleetProcess, str], None]
"""Called with a process whose state changed and a few words on why."""


class StartFailed(RuntimeError):
    """A process did not become ready; the text ends with the last lines of its log."""


class Supervisor:
    """Runs `launches`; an async context manager that stops them all on the way out.

    `members` is how many instances a router has to list before the fleet is ready: those among `launches` where it
    is left out. `broken` is set once the fleet cannot serve any more: the router stays down, or all that could
    decode do.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        local: LocalSpec,
        on_change: OnChange | None = None,
        members: int | None = None,
    ) -> None:
        self.local = local
        self.processes = [FleetProcess(launch, local.stop_timeout / 1000) for launch in launches]
        self.broken = asyncio.Event()
        self._on_change = on_change
        self._members = sum(launch.role not in _LIGHT for launch in launches) if members is None else members
        # Importing vLLM keeps one core busy, so more starts at once than cores only slow each other down.
        self._slots = asyncio.Semaphore(local.parallel_starts or len(os.sched_getaffinity(0)))
        self._tasks: list[asyncio.Task[None]] = []
        self._asked: set[str] = set()  # names of those whose next end was asked for
        self._session: aiohttp.ClientSession | None = None
        self._stopping = False

    async def __aenter__(self) -> Self:
        import aiohttp

        self._session = aiohttp.ClientSession()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()
        if self._session is not None:
            await self._session.close()

    async def start(self) -> None:
        """Start everything and wait until all are ready.

        Raises PortTaken before anything is started, StartFailed for the first process that fails.
        """
        check_ports(process.launch for process in self.processes)
        first = [asyncio.get_running_loop().create_future() for _ in self.processes]
        for process, ready in zip(self.processes, first, strict=True):
            self._watch(process, ready)
        try:
            await asyncio.gather(*first)
        finally:
            for future in first:
                future.cancel()
        await self._all_known()

    async def _all_known(self) -> None:
        """Until each router knows every instance: a request before that would take another path."""
        assert self._session is not None
        for process in self.processes:
            if process.launch.role != "router":
                continue
            try:
                async with asyncio.timeout(_KNOWN_S):
                    while len(ready_members(await ask(self._session, process.launch))) < self._members:
                        await asyncio.sleep(0.1)
            except TimeoutError as error:
                raise StartFailed(
                    f"{process.name} did not find all instances within {_KNOWN_S:g} s\n{process.log_tail()}"
                ) from error

    async def stop(self) -> None:
        """Stop controller and routers, then the instances; nothing they started is left. Safe to call twice."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        for light in (True, False):
            group = [p for p in self.processes if (p.launch.role in _LIGHT) == light]
            await asyncio.gather(*(self._stop_one(process) for process in group))

    def kill(self) -> None:
        """Cut a running `stop` short: what still runs is killed."""
        for process in self.processes:
            process.terminate()

    def find(self, name: str) -> FleetProcess:
        """The process of that name. Raises KeyError."""
        for process in self.processes:
            if process.name == name:
                return process
        raise KeyError(name)

    @property
    def session(self) -> aiohttp.ClientSession:
        """For questions to the processes; there between `__aenter__` and `__aexit__`."""
        assert self._session is not None
        return self._session

    def mark(self, process: FleetProcess, state: State, why: str = "") -> None:
        """Say that a running process is `draining`, or `ready` again."""
        self._change(process, state, why)

    async def renew(self, process: FleetProcess) -> None:
        """End a process and wait until it is ready in another life; one that had failed for good is started anew.

        It counts for no limit on restarts and waits for no back-off. Raises StartFailed where it is not ready at once;
        it is then kept as after any other end.
        """
        if process.state == "failed":
            process.restarts += 1
            ready = asyncio.get_running_loop().create_future()
            self._watch(process, ready)
            await ready
            return
        life, process.problem = process.restarts, None
        try:
            if process.state in ("ready", "draining"):  # else it has ended by itself and is being started
                life += 1
                self._asked.add(process.name)
                self._change(process, "stopping", "as asked")
                await process.stop()
            end = time.monotonic() + self.local.start_timeout / 1000 + _KNOWN_S
            while process.restarts < life or process.state != "ready":
                if process.restarts > life or self._down(process) or time.monotonic() > end:
                    raise StartFailed(
                        f"{process.name} did not become ready again\n{process.problem or process.log_tail()}"
                    )
                await asyncio.sleep(_LOOK_S)
        finally:
            self._asked.discard(process.name)

    async def _stop_one(self, process: FleetProcess) -> None:
        if process.running:
            self._change(process, "stopping", "")
            await process.stop()
        if process.state not in ("failed", "stopped"):
            self._change(process, "stopped", "")

    def _watch(self, process: FleetProcess, first: asyncio.Future[None]) -> None:
        task = asyncio.create_task(self._keep(process, first), name=process.name)
        task.add_done_callback(lambda ended: self._unwatched(process, first, ended))
        self._tasks.append(task)

    def _unwatched(self, process: FleetProcess, first: asyncio.Future[None], task: asyncio.Task[None]) -> None:
        """After a defect nobody may wait for the process any longer, nor take it for one that is kept."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        problem = f"it is not watched any more: {error!r}"
        self._change(process, "failed", problem)
        if not first.done():
            first.set_exception(StartFailed(f"{process.name}: {problem}"))
        self._give_up_where_nothing_serves()

    async def _keep(self, process: FleetProcess, first: asyncio.Future[None]) -> None:
        """Start, watch and restart one process until the fleet stops."""
        policy = self.local.restart
        in_a_row = 0
        while True:
            problem = await self._start_once(process)
            if problem is None:
                if not first.done():
                    first.set_result(None)
                code = await process.wait()
                if process.name in self._asked:
                    self._asked.discard(process.name)
                    process.restarts += 1
                    self._change(process, "restarting", "as asked")
                    continue
                problem = f"ended with status {code}"
                if process.ready_at and time.monotonic() - process.ready_at > policy.reset_after / 1000:
                    in_a_row = 0
            process.problem = f"{process.name}: {problem}\n--- {process.launch.log}\n{process.log_tail()}"
            if not first.done():
                # A first start that fails is a wrong setting far more often than bad luck.
                self._change(process, "failed", problem)
                first.set_exception(StartFailed(process.problem))
                # Asked for by `renew`, the others may have failed while it started.
                self._give_up_where_nothing_serves()
                return
            if first.cancelled() or not policy.enabled or in_a_row >= policy.max_restarts:
                self._change(process, "failed", problem)
                self._give_up_where_nothing_serves()
                return
            delay = policy.delay_s(in_a_row)
            in_a_row += 1
            process.restarts += 1
            self._change(process, "restarting", f"{problem}; restart {process.restarts} in {delay:g} s")
            await asyncio.sleep(delay)

    async def _start_once(self, process: FleetProcess) -> str | None:
        """Returns None when the process is ready, else what went wrong; it does not run then."""
        assert self._session is not None
        # They are light, and the router must not wait for a slot behind the instances it waits for.
        slot = contextlib.nullcontext() if process.launch.role in _LIGHT else self._slots
        timeout_s = self.local.start_timeout / 1000
        async with slot:
            try:
                await process.start(fresh_log=process.restarts == 0)
                self._change(process, "starting", "")
                await process.wait_ready(self._session, timeout_s)
            except (Ended, PortTaken) as error:
                return str(error)
            except TimeoutError:  # before OSError, of which it is one
                await process.stop()
                return f"not ready after {timeout_s:g} s"
            except OSError as error:
                return f"cannot be started: {error}"
        assert process.ready_at is not None
        self._change(process, "ready", f"in {process.ready_at - process.started_at:.1f} s")
        return None

    @staticmethod
    def _down(process: FleetProcess) -> bool:
        return process.state == "failed"

    def _can_serve(self) -> bool:
        routers = [not self._down(p) for p in self.processes if p.launch.role == "router"]
        decoders = [not self._down(p) for p in self.processes if p.launch.role in ("decode", "any")]
        return all(routers) and (any(decoders) or not decoders)

    def _give_up_where_nothing_serves(self) -> None:
        if not self._can_serve():
            self.broken.set()

    def _change(self, process: FleetProcess, state: State, why: str) -> None:
        process.state = state
        try:
            write_state(self.local.log_dir, self.processes)
        except OSError as error:  # a full disk must not end what serves
            why = f"{why}; its state cannot be written: {error}".removeprefix("; ")
        if self._on_change is not None:
            self._on_change(process, why)
