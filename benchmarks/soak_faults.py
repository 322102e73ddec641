"""Carries out the faults of a schedule on a running fleet and writes down what came of each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from soak_fleet import View
from soak_schedule import ROUTER, Event

from vllm_suite.roles.client import Access, NoAnswer, look, role, switch

_SWITCH_S = 160.0
_POLL_S = 0.25
READY_S = 240.0


@dataclass
class Done:
    """One fault as it went. `ended_s` is when the fleet was whole again, as far as this fault goes."""

    event: Event
    began_s: float
    ended_s: float | None = None
    result: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """As JSON types."""
        times = {"began_s": self.began_s, "ended_s": self.ended_s}
        return {**self.event.document(), **times, "result": self.result, **self.facts}


class Faults:
    """Runs the events at their times; each is followed to its end beside the next ones."""

    def __init__(self, view: View, session: aiohttp.ClientSession, began: float) -> None:
        self.done: list[Done] = []
        self._view = view
        self._session = session
        self._began = began
        self._stopped: dict[str, list[int]] = {}

    def now_s(self) -> float:
        """Seconds since the start of the load."""
        return round(time.monotonic() - self._began, 3)

    async def run(self, events: Sequence[Event]) -> None:
        """All of them, and until the last has ended."""
        try:
            async with asyncio.TaskGroup() as group:
                for event in events:
                    await asyncio.sleep(max(0.0, event.at_s - (time.monotonic() - self._began)))
                    done = Done(event, self.now_s())
                    self.done.append(done)
                    print(f"{done.began_s:8.1f} s  {event.kind} {event.target} {event.role}", flush=True)
                    group.create_task(self._one(done))
        finally:
            for name in list(self._stopped):
                self._continue(name)

    async def _one(self, done: Done) -> None:
        event = done.event
        pids = self._view.processes(event.target)
        if not pids:
            done.result = f"left out: {self._view.member(event.target)['state']}"
        elif event.kind == "freeze":
            await self._freeze(done, pids)
        elif event.kind == "switch":
            await self._switch(done)
        else:
            await self._end(done, pids)
        done.ended_s = self.now_s()

    async def _freeze(self, done: Done, pids: list[int]) -> None:
        name = done.event.target
        if name in self._stopped:
            done.result = "left out: it is stopped"
            return
        self._stopped[name] = pids
        _signal(pids, signal.SIGSTOP)
        await asyncio.sleep(done.event.seconds)
        self._continue(name)
        done.result = "went on"

    def _continue(self, name: str) -> None:
        _signal(self._stopped.pop(name, []), signal.SIGCONT)

    async def _end(self, done: Done, pids: list[int]) -> None:
        name = done.event.target
        restarts = self._view.member(name)["restarts"]
        if done.event.kind == "kill":
            _signal(pids, signal.SIGKILL)
        else:
            _signal(pids[:1], signal.SIGTERM)
        deadline = time.monotonic() + READY_S
        while (one := self._view.member(name))["restarts"] == restarts or one["state"] != "ready":
            if time.monotonic() > deadline or one["state"] == "failed":
                done.result = f"NOT BACK: {one['state']}"
                return
            await asyncio.sleep(_POLL_S)
        done.result = "back"

    async def _switch(self, done: Done) -> None:
        """As `vllm-suite roles set`; an instance that is out afterwards is restarted, as its operator would."""
        name, keys = done.event.target, self._view.keys
        access = Access(self._view.router, keys.router_control, keys.instance_control)
        try:
            fleet, _ = await look(self._session, access)
            [one] = [one for one in fleet if one.instance_id == name]
            answer = await switch(self._session, one, done.event.role, access.instance_key)
        except (NoAnswer, ValueError) as error:
            done.result = f"not asked: {error}"
            return
        if answer.get("outcome") != "begun":
            done.result = f"{answer.get('outcome')}: {answer.get('reason')}"
            return
        deadline = time.monotonic() + _SWITCH_S
        while time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(NoAnswer):
                now = await role(self._session, one.url, access.instance_key)
                last = now.get("last") or {}
                if now.get("epoch") != one.epoch:
                    done.result = "restarted meanwhile"
                    return
                if last.get("outcome") is not None:
                    done.result = str(last["outcome"])
                    done.facts = {"source": one.role, "reason": last.get("reason"), "seconds": last.get("seconds")}
                    break
        else:
            done.result = "NO END of the switch"
            return
        if done.result == "out" and (pids := self._view.processes(name)):
            await self._end(Done(Event(0.0, "restart", name), 0.0), pids)


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def explained(done: Sequence[Done], at_s: float, after_s: float = 6.0) -> bool:
    """Whether some fault that can cost requests was on, or had just ended, at a time."""
    return any(
        one.began_s - 0.5 <= at_s and (one.ended_s is None or at_s <= one.ended_s + after_s)
        for one in done
        if not one.result.startswith("left out")
    )


__all__ = ["ROUTER", "Done", "Faults", "explained"]
