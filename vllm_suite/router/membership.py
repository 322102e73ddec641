"""Keeps the pool true: polls every discovered address and admits, refreshes or forgets who answers there."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from itertools import count

from vllm_suite.router.config import Membership as Settings
from vllm_suite.router.config import Role
from vllm_suite.router.discovery import Discovery, DiscoveryError, Target
from vllm_suite.router.members import Member, Pool, State
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.probe import Gone, Probe, Silent

logger = logging.getLogger(__name__)

_AFTER_A_DEFECT_S = 1.0


class Membership:
    """Owns one polling task per address. `start` and `stop` bracket its life on one event loop."""

    def __init__(
        self,
        settings: Settings,
        discoveries: list[Discovery],
        probe: Probe,
        pool: Pool,
        metrics: RouterMetrics,
        history_chunks: int,
    ) -> None:
        self._settings = settings
        self._discoveries = discoveries
        self._probe = probe
        self._pool = pool
        self._metrics = metrics
        self._history_chunks = history_chunks
        self._watchers: dict[Target, _Watcher] = {}
        self._found: list[frozenset[Target]] = [frozenset() for _ in discoveries]
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Ask every source once, then keep polling in the background."""
        self._tasks = [asyncio.create_task(self._discover(index)) for index in range(len(self._discoveries))]

    async def stop(self) -> None:
        """End all polling; members stay as they are."""
        tasks = self._tasks + [watcher.task for watcher in self._watchers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in self._discoveries:
            await source.close()

    def missing(self) -> dict[str, int]:
        """Addresses at which nobody has answered, or nobody answers any more, by the role they are listed with."""
        found: dict[str, int] = {}
        for target, watcher in self._watchers.items():
            if watcher.member is None:
                found[target.role] = found.get(target.role, 0) + 1
        return found

    def suspect(self, member: Member) -> None:
        """A request failed on this member's connection: no new work until it has answered a poll."""
        if member.suspect:
            return
        member.suspect = True
        self._metrics.member_event("suspect", member.instance_id)
        for watcher in self._watchers.values():
            if watcher.member is member:
                watcher.wake.set()

    def refused(self, member: Member) -> None:
        """It does not do that work now: it is changing its role, or has changed it. Ask at once what it is."""
        member.refused_at = asyncio.get_running_loop().time()
        self._metrics.member_event("refused", member.instance_id)
        for watcher in self._watchers.values():
            if watcher.member is member:
                watcher.wake.set()

    async def _discover(self, index: int) -> None:
        source = self._discoveries[index]
        said = ""
        while True:
            least_s = 0.0
            try:
                self._found[index] = await source.targets()
                said = ""
                self._reconcile()
            except DiscoveryError as exc:
                self._metrics.member_event("discovery_failed")
                if said != str(exc):  # once, not at every look of an outage
                    logger.warning("discovery: %s", exc)
                said = str(exc)
            except Exception:
                # Whatever it is, the next answer may be better; without this nobody would ask again.
                self._metrics.member_event("discovery_failed")
                logger.exception("discovery")
                least_s = _AFTER_A_DEFECT_S
            if source.interval_s is None and not least_s:
                return
            await asyncio.sleep(max(source.interval_s or 0.0, least_s))

    def _reconcile(self) -> None:
        # One address is polled once even where two sources name it.
        wanted: dict[str, Target] = {}
        for target in sorted(frozenset[Target]().union(*self._found)):
            wanted.setdefault(target.url, target)
        targets = set(wanted.values())
        for target in set(self._watchers) - targets:
            watcher = self._watchers.pop(target)
            watcher.task.cancel()
            watcher.forget("address withdrawn")
        for target in targets - set(self._watchers):
            self._watchers[target] = _Watcher(
                target, self._settings, self._probe, self._pool, self._metrics, self._history_chunks
            )


class _Watcher:
    """Polls one address."""

    def __init__(
        self,
        target: Target,
        settings: Settings,
        probe: Probe,
        pool: Pool,
        metrics: RouterMetrics,
        history_chunks: int,
    ) -> None:
        self._target = target
        self._settings = settings
        self._probe = probe
        self._pool = pool
        self._metrics = metrics
        self._history_chunks = history_chunks
        self._made_epochs = count(1)
        self.member: Member | None = None
        self.wake = asyncio.Event()
        self._defect = ""
        self._last_good = asyncio.get_running_loop().time()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        settings = self._settings
        loop = asyncio.get_running_loop()
        while True:
            self.wake.clear()
            timeout_s = settings.poll_timeout_s
            if self.member is not None:
                left_s = self._last_good + settings.forget_after_s - loop.time()
                timeout_s = min(timeout_s, max(left_s, 0.05))
            failed = True
            asked = loop.time()
            try:
                state = await self._probe.ask(self._target.url, timeout_s)
                self._last_good = loop.time()
                self._good(state, asked)
                failed = False
            except Gone:
                self.forget("gone")
            except Silent as exc:
                self._silent(str(exc))
            except Exception as exc:
                # An answer that nobody foresaw must not end the polling; said once, not twice a second.
                if repr(exc) != self._defect:
                    self._defect = repr(exc)
                    logger.exception("%s: the answer to a poll", self._target.url)
                self._silent(repr(exc))
            # While a member is silent its deadline counts, so it is asked again without much of a pause.
            pause_s = min(settings.poll_interval_s, 0.1) if failed and self.member else settings.poll_interval_s
            try:
                async with asyncio.timeout(pause_s):
                    await self.wake.wait()
            except TimeoutError:
                pass

    def _good(self, state: State, asked: float) -> None:
        member = self.member
        if not state.epoch:
            epoch = member.epoch if member is not None else f"stock-{next(self._made_epochs)}"
            state = dataclasses.replace(state, epoch=epoch)
        if member is not None and (state.instance_id, state.epoch) != (member.instance_id, member.epoch):
            self.forget("restarted")
            member = None
        role: Role = self._target.role if state.role == "any" else state.role
        if member is None:
            if not state.ready:
                return  # admitted when it first says it is ready
            if self._pool.get(state.instance_id, state.epoch) is not None:
                self._metrics.member_event("duplicate", state.instance_id)
                return
            member = Member(self._target.url, state, role, self._history_chunks)
            self.member = member
            self._pool.admit(member)
            self._metrics.member_event("admitted", member.instance_id)
            logger.info("admitted %s epoch %s role %s", member.instance_id, member.epoch, role)
            return
        was_ready = member.ready
        switched = member.role != role
        if switched:
            self._metrics.member_event("switched", member.instance_id)
            logger.info("%s is %s now, role epoch %d", member.instance_id, role, state.role_epoch)
        member.state, member.role = state, role
        member.reachable, member.suspect = True, False
        # An answer to a question asked before the refusal may be older than it.
        if member.refused_at is not None and member.refused_at <= asked:
            member.refused_at = None
        if member.ready and (switched or not was_ready):
            self._pool.notify()

    def _silent(self, reason: str) -> None:
        member = self.member
        if member is None:
            return
        if asyncio.get_running_loop().time() - self._last_good >= self._settings.forget_after_s:
            self.forget(reason)
        elif member.reachable:
            member.reachable = False
            self._metrics.member_event("unreachable", member.instance_id)
            logger.warning("%s: %s", member.instance_id, reason)

    def forget(self, reason: str) -> None:
        """Drop the member, if there is one, with its history and counts."""
        member, self.member = self.member, None
        if member is None:
            return
        self._pool.forget(member)
        self._metrics.member_event("restarted" if reason == "restarted" else "forgotten", member.instance_id)
        logger.warning("forgot %s epoch %s: %s", member.instance_id, member.epoch, reason)
