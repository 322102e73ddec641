"""Rolling restart of a fleet that `up` runs: one instance at a time leaves as a pod of the chart does, and comes back.

The router is told to leave it out, its requests end, KV blocks and encoder outputs that it has computed are fetched or
their leases end.
Then it is ended, started and listed again, and the next one follows. Nothing is cut off unless `force` is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vllm_suite.fleet.engine import Settings
from vllm_suite.fleet.keys import ENV_VLLM_KEY
from vllm_suite.fleet.launch import Launch
from vllm_suite.fleet.pod.leaving import LOOK_S, Idle, leases_in, requests_in
from vllm_suite.fleet.process import FleetProcess, ask
from vllm_suite.fleet.same_role import role_of, switch_again
from vllm_suite.fleet.scrape import scrape
from vllm_suite.fleet.state_file import write_atomically
from vllm_suite.fleet.supervisor import StartFailed, Supervisor
from vllm_suite.identity import Role

if TYPE_CHECKING:
    import aiohttp

_LISTED_S = 30.0  # for the router to leave an instance out, or to list it again
_OTHERS_S = 10.0  # for another instance that has just missed a poll
_POLL_S = 0.25
_OF_VLLM = ("vllm:num_requests_running", "vllm:num_requests_waiting")


class Order(Settings):
    """What is to be restarted: all instances where no name is given."""

    names: tuple[str, ...] = Field(default=(), description="names of instances")
    force: bool = Field(default=False, description="also where nobody else does that work, or work is not done in time")
    finish_s: Annotated[float, Field(gt=0, le=86_400)] = Field(
        default=300.0, description="seconds that an instance may take to finish its work"
    )


class Unknown(ValueError):
    """The order names what is no instance of the fleet."""


class NotRestarted(RuntimeError):
    """The restart has stopped; the text says where and why. What was not restarted serves as before."""


def chosen(order: Order, processes: Sequence[FleetProcess]) -> list[FleetProcess]:
    """The instances that the order means, in the fleet's order. Raises Unknown."""
    able = [process for process in processes if process.launch.role not in ("router", "controller")]
    wrong = sorted(set(order.names) - {process.name for process in able})
    if wrong:
        known = ", ".join(process.name for process in able)
        raise Unknown(f"no instance of this fleet: {', '.join(wrong)}; its instances are {known}")
    return [process for process in able if process.name in order.names or not order.names]


def alone(rows: Mapping[str, Mapping[str, Any]], url: str) -> str | None:
    """The stage that nobody would do while the instance at `url` is away; None where others do its work.

    `rows` are those of the router by address. Without prefill or encoders decode computes, which is slow and no loss,
    but is not what the fleet was built for.
    """
    if url not in rows:
        return None
    role = str(rows[url]["role"])
    stage = "decode" if role == "any" else role
    others = (row for at, row in rows.items() if at != url and row["ready"])
    return None if any(row["role"] in (stage, "any") for row in others) else stage


async def work(session: aiohttp.ClientSession, launch: Launch) -> tuple[int, dict[str, float]] | None:
    """Requests in an instance, and leases of what it keeps for peers by series; None where it does not say."""
    samples = await scrape(session, launch.url, launch.env.get(ENV_VLLM_KEY))
    if samples is None:
        return None
    if launch.ready != "state":  # a plain vLLM
        return int(sum(samples.total(name) for name in _OF_VLLM)), {}
    state = await ask(session, launch)
    return None if state is None else (requests_in(state), leases_in(samples.total))


class Roll:
    """One restart of some instances; `run` it once.

    Args:
        withdrawn: the file with addresses that the router leaves out.
        say: gets a line for people after each step.
        stop: set when whoever asked does not want it any more; the instance under way is finished or left as it was.
    """

    def __init__(
        self, supervisor: Supervisor, withdrawn: Path, order: Order, say: Callable[[str], None], stop: asyncio.Event
    ) -> None:
        self._supervisor = supervisor
        self._withdrawn = withdrawn
        self._order = order
        self._say = say
        self._stop = stop
        (self._router,) = [one for one in supervisor.processes if one.launch.role == "router"]
        self.restarted: list[dict[str, Any]] = []

    async def run(self) -> None:
        """Restart them; `restarted` has a row for each that was. Raises Unknown and NotRestarted."""
        processes = chosen(self._order, self._supervisor.processes)
        if not self._order.force:
            rows = await self._rows()
            for process in processes:
                self._refuse_alone(process, rows)
        for process in processes:
            if self._stop.is_set():
                raise NotRestarted(f"given up before {process.name}")
            await self._one(process)

    async def _one(self, process: FleetProcess) -> None:
        began, cut = time.monotonic(), 0
        role = await role_of(self._supervisor.session, process.launch)
        if process.state == "ready":
            cut = await self._leave(process)
        elif process.state != "failed":
            raise NotRestarted(f"{process.name} is {process.state}; wait until it is ready")
        left = time.monotonic()
        self._say(f"{process.name}: {'ended amid its work' if cut else 'nothing left to do'}, starting again")
        try:
            await self._supervisor.renew(process)
            if role is not None:
                role = await self._same_role(process, role)
        except StartFailed as error:
            raise NotRestarted(str(error)) from error
        finally:
            self._list(process)
        await self._until(
            lambda rows: bool(rows.get(process.launch.url, {}).get("ready")),
            f"{process.name} is ready, but the router does not list it after {_LISTED_S:g} s",
        )
        now = time.monotonic()
        row = {"name": process.name, "drained_s": left - began, "restarted_s": now - left, "cut_requests": cut}
        self.restarted.append(row if role is None else {**row, "role": role})
        self._say(f"{process.name}: serves again after {now - began:.1f} s")

    async def _same_role(self, process: FleetProcess, role: Role) -> Role:
        """The role it has in its new life: that of the last one, where it can be switched to it."""
        if role == process.launch.role:
            return role
        why = await switch_again(self._supervisor.session, process.launch, role)
        self._say(f"{process.name}: {role} again" if why is None else f"{process.name}: is not {role} again: {why}")
        return role if why is None else "any"

    async def _leave(self, process: FleetProcess) -> int:
        """Until the instance has nothing left to do; the requests that it still has where `force` ends it."""
        name, url = process.name, process.launch.url
        if not self._order.force:
            await self._others(process)
        self._supervisor.mark(process, "draining")
        try:
            write_atomically(self._withdrawn, url + "\n")
            await self._until(lambda rows: url not in rows, f"{name}: the router goes on sending to it")
            self._say(f"{name}: gets no new work, finishing")
            return await self._finished(process)
        except BaseException:
            self._list(process)
            raise

    async def _finished(self, process: FleetProcess) -> int:
        end, idle = time.monotonic() + self._order.finish_s, Idle(time.monotonic())
        while True:
            found = await work(self._supervisor.session, process.launch)
            now = time.monotonic()
            if process.state != "draining":
                return 0  # it has ended by itself, and `up` starts it
            if found is None:
                idle.unseen()
            elif idle.after(*found, now):
                return 0
            if self._stop.is_set():
                raise NotRestarted(f"given up; {process.name} was not ended and serves again")
            if now > end:
                requests, leases = found or (1, {})
                if self._order.force:
                    return max(requests, 1)
                left = f"{requests} requests and {sum(leases.values()):g} leases left"
                said = left if found else "it does not say what it does"
                raise NotRestarted(
                    f"{process.name}: after {self._order.finish_s:g} s {said}; it was not ended and serves again. "
                    "--finish gives it longer, --force ends it"
                )
            await asyncio.sleep(LOOK_S)

    def _list(self, process: FleetProcess) -> None:
        self._withdrawn.unlink(missing_ok=True)
        if process.state == "draining":
            self._supervisor.mark(process, "ready", "again")

    async def _others(self, process: FleetProcess) -> None:
        end = time.monotonic() + _OTHERS_S
        while alone(rows := await self._rows(), process.launch.url) and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        self._refuse_alone(process, rows)

    def _refuse_alone(self, process: FleetProcess, rows: Mapping[str, Mapping[str, Any]]) -> None:
        stage = alone(rows, process.launch.url)
        if stage is not None:
            raise NotRestarted(
                f"{process.name}: no other instance that is ready does {stage}. --force restarts it all the same; "
                f"requests then {_WITHOUT[stage]}"
            )

    async def _rows(self) -> dict[str, dict[str, Any]]:
        """The router's list by address; asked again for a while where an answer is late."""
        end = time.monotonic() + _LISTED_S
        while (answer := await ask(self._supervisor.session, self._router.launch)) is None:
            if time.monotonic() > end:
                raise NotRestarted(f"the router at {self._router.launch.url} does not answer")
            await asyncio.sleep(_POLL_S)
        return {row["url"]: row for row in answer.get("instances", [])}

    async def _until(self, true: Callable[[Mapping[str, Mapping[str, Any]]], bool], else_: str) -> None:
        end = time.monotonic() + _LISTED_S
        while not true(await self._rows()):
            if time.monotonic() > end:
                raise NotRestarted(else_)
            await asyncio.sleep(_POLL_S)


_WITHOUT: Mapping[str, str] = {
    "decode": "wait for router.limits.wait_for_instance_s and get a 503",
    "prefill": "are computed by decode",
    "encode": "have their media encoded by prefill",
}
