"""Carries a switch through on one instance: close, count down, set, verify by served requests, open again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vllm_suite.identity import Role
from vllm_suite.roles.gate import Door
from vllm_suite.roles.state import STAGES, Deadlines, Phase, RoleState, Stage, advance, begin, died, fail, serves

_log = logging.getLogger("vllm.suite.roles")

POLL_S = 0.05
Outcome = Literal["switched", "back", "out"]


class SwitchError(Exception):
    """A step of the switch did not do what it has to; the text says what was found."""


class EngineDied(Exception):
    """The engine behind the instance has ended."""


@dataclass(frozen=True)
class Settings:
    """What an engine's limits were and are, by name."""

    before: Mapping[str, int]
    after: Mapping[str, int]

    @property
    def changed(self) -> dict[str, list[int]]:
        """From and to, of those that differ."""
        return {name: [self.before[name], now] for name, now in self.after.items() if self.before.get(name) != now}


class Engine(Protocol):
    """What a switch needs of the engine. Called by `Switcher` only; every method may raise `EngineDied`."""

    async def unfinished(self) -> int:
        """Requests in the engine and its front end."""

    async def untouched(self, names: Collection[str]) -> set[str]:
        """Those of the requests, by their `X-Request-Id`, of which nothing was begun and which no other instance waits
        for with what they need."""

    async def set_role(self, role: Role) -> Settings:
        """Set the limits of a role and read them back. Raises `SwitchError` where they are not as they should be."""

    async def probe(self, stage: Stage | None) -> object:
        """A request of that stage, served through the API and checked; what it answered, equal each time. None: one to
        decode that does not name its stage, which every role answers.

        Raises `SwitchError` where the answer is wrong."""

    async def refuses(self, stage: Stage) -> bool:
        """Whether a request of that stage is refused at the door."""


@dataclass
class Report:
    """One attempt, as it is served. `seconds` by phase; `changed` are the engine's limits, from and to; `accepts` says
    of each stage that the two roles treat differently whether a request of it was let in before and after; `given_back`
    counts by stage the requests that went back to the router, None where none was to."""

    attempt: int
    source: Role
    target: Role
    outcome: Outcome | None = None
    reason: str | None = None
    changed: dict[str, list[int]] = field(default_factory=dict)
    accepts: dict[Stage, list[bool]] = field(default_factory=dict)
    verified: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    given_back: dict[str, int] | None = None


class Switcher:
    """One instance. Runs on the event loop of its API server.

    Args:
        can: roles that this instance can have.
        ended: gets the report of every attempt.
    """

    def __init__(
        self,
        door: Door,
        engine: Engine,
        can: Sequence[Role],
        deadlines: Deadlines | None = None,
        clock: Callable[[], float] = time.monotonic,
        ended: Callable[[Report], None] = lambda report: None,
    ) -> None:
        self.door = door
        self.can = tuple(can)
        self.deadlines = deadlines or Deadlines()
        self.last: Report | None = None
        self._engine = engine
        self._clock = clock
        self._ended = ended
        self._task: asyncio.Task[None] | None = None

    @property
    def state(self) -> RoleState:
        """Where it is now."""
        return self.door.state

    def begin(self, target: Role, expected_epoch: int, give_back: bool = False) -> Report:
        """Start a switch in the background. Raises `state.Refused`, and `SwitchError` for a role it cannot have.

        `give_back` sends queued requests back to the router instead of serving them first: others can serve them.
        """
        if target not in self.can:
            raise SwitchError(f"this instance cannot be {target}; it can be {', '.join(self.can)}")
        self.door.state = begin(self.state, target, expected_epoch, self._clock(), self.deadlines)
        self.last = Report(self.state.attempt, self.state.role, target, given_back={} if give_back else None)
        self._task = asyncio.create_task(self._run(self.last), name="vllm-suite role switch")
        self._task.add_done_callback(self._never_in_between)
        return self.last

    async def settled(self) -> None:
        """Wait until no switch is under way."""
        if self._task is not None:
            await asyncio.shield(self._task)

    def close(self) -> None:
        """The server ends."""
        if self._task is not None:
            self._task.cancel()

    def _never_in_between(self, task: asyncio.Task[None]) -> None:
        if self.state.phase not in ("serving", "out"):
            error = None if task.cancelled() else task.exception()
            _log.error("vllm-suite: the switch ended while it was %s: %r", self.state.phase, error)
            self.door.state = died(self.state)

    async def _run(self, report: Report) -> None:
        before: object = None
        try:
            await self._phase(report, "closing", lambda: self._drain(report))
            before = await self._phase(report, "drained", lambda: self._before(report))
            await self._phase(report, "switching", lambda: self._switch(report, before))
            await self._phase(report, "verified", self._alive)
            report.outcome = "switched"
        except _Failed as failed:
            report.reason = str(failed)
            report.outcome = "back"
            if self.state.phase == "restoring":
                await self._restore(report, before)
            if self.state.phase == "out":
                report.outcome, report.reason = "out", self.state.failure
        level = logging.INFO if report.outcome == "switched" else logging.WARNING
        _log.log(level, "vllm-suite: role %s to %s: %s %s", report.source, report.target, report.outcome, report.reason)
        self._ended(report)

    async def _restore(self, report: Report, before: object) -> None:
        try:
            await self._phase(report, "restoring", lambda: self._set_back(report, before))
        except _Failed:
            report.outcome = "out"

    async def _phase(self, report: Report, phase: Phase, work: Callable[[], Any]) -> Any:
        """Do the work of a phase within its deadline, and go on to the next. Raises `_Failed`."""
        assert self.state.phase == phase
        attempt, began = self.state.attempt, self._clock()
        result, reason = None, ""
        try:
            async with asyncio.timeout(max(self.state.deadline - began, 0.0)):
                result = await work()
        except EngineDied:
            self.door.state = died(self.state)
            raise _Failed("the engine has ended") from None
        except TimeoutError:
            reason = f"{phase} took longer than {self.deadlines.of(phase):g} s"
        except Exception as error:  # noqa: BLE001  whatever a step raises, the instance must not stay in between
            reason = f"{phase}: {error}" if isinstance(error, SwitchError) else f"{phase}: {error!r}"
        now = self._clock()
        report.seconds[phase] = round(now - began, 6)
        if reason:
            self.door.state = fail(self.state, attempt, reason, now, self.deadlines)
            raise _Failed(reason)
        self.door.state = advance(self.state, attempt, phase, now, self.deadlines)
        if self.state.failure is not None and phase != "restoring":
            raise _Failed(self.state.failure)
        return result

    async def _drain(self, report: Report) -> None:
        # What was begun runs to its end. The engine is asked too: it may still be at a request whose client left.
        while self.door.running or await self._engine.unfinished():
            if report.given_back is not None and (names := self.door.open_names()):
                back = self.door.give_back(await self._engine.untouched(names))
                report.given_back = dict(Counter(report.given_back) + back)
            await asyncio.sleep(POLL_S)

    async def _before(self, report: Report) -> object:
        for stage in STAGES:
            if serves(report.source, stage) != serves(report.target, stage):
                report.accepts[stage] = [not await self._engine.refuses(stage)]
        return await self._engine.probe(None)

    async def _alive(self) -> None:
        await self._engine.unfinished()

    async def _switch(self, report: Report, before: object) -> None:
        target, source = report.target, report.source
        report.changed = (await self._engine.set_role(target)).changed
        for stage in (stage for stage in STAGES if serves(target, stage) and self._has(stage)):
            answer = await self._engine.probe(stage)
            if stage == "decode" and answer != before:
                raise SwitchError(f"the same request is answered {answer!r}, and {before!r} before")
            report.verified.append(f"served {stage}")
        for stage, accepted in report.accepts.items():
            accepted.append(not await self._engine.refuses(stage))
            if accepted[1] != serves(target, stage):
                raise SwitchError(f"a {stage} request is {'still taken' if accepted[1] else 'refused'}")
            if not accepted[1]:
                report.verified.append(f"refused {stage}")
        if not report.changed and not any(before != after for before, after in report.accepts.values()):
            raise SwitchError(f"nothing has changed: as {source} it took the same requests with the same limits")

    def _has(self, stage: Stage) -> bool:
        return stage in self.can

    async def _set_back(self, report: Report, before: object) -> None:
        await self._engine.set_role(report.source)
        if await self._engine.probe(None) != before:
            raise SwitchError("the same request is answered differently after setting back")


class _Failed(Exception):
    pass
