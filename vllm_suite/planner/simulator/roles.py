"""Carries out role switches of a simulated fleet: drain, wait for the cost, join the other pool."""

from __future__ import annotations

from collections.abc import Callable

from vllm_suite.planner.plan import PlanError, Role
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.encoders import Encoder
from vllm_suite.planner.simulator.handover import Event
from vllm_suite.planner.simulator.members import Members
from vllm_suite.planner.simulator.routing import Instance
from vllm_suite.planner.simulator.switching import Stage, Switch, Switched, Switching


class Roles:
    """One fleet's switches.

    Args:
        more: whether requests are under way or to come; the policy is not asked after the last one.

    Attributes:
        made: switches that have ended.
    """

    def __init__(self, members: Members, clock: Clock, switching: Switching, more: Callable[[], bool]) -> None:
        sizes = {pool.name: pool.parallel.gpus for pool in members.plan.pools}
        if any(pool.parallel.dp > 1 for pool in members.plan.pools):
            raise PlanError("engines of several data-parallel ranks cannot change their roles")
        if len(set(sizes.values())) > 1:
            raise PlanError(f"engines of different sizes cannot change their roles: {sizes}")
        self.members, self.clock, self.switching, self.more = members, clock, switching, more
        self.made: list[Switched] = []
        self._begun, self._ticks = False, 0
        self._switch: Switch | None = None
        self._leaving: Instance | Encoder | None = None
        self._decided = 0.0

    def begin(self, now: float) -> None:
        """The first request arrived."""
        if not self._begun:
            self._begun = True
            self._post(now)

    def _post(self, now: float) -> None:
        self._ticks += 1
        self.clock.post(now + self.switching.every, Event.TICK, 0, self._ticks, self._tick)

    def _tick(self, now: float, version: int) -> None:
        if self._switch is None:
            switch = self.switching.policy(self.stages(), now)
            if switch is not None and self._allowed(switch):
                self._drain(switch, now)
        if self.more():
            self._post(now)

    def stages(self) -> list[Stage]:
        """The pools, in the order of the plan. What waits for its pull waits for decode."""
        found = []
        for pool in self.members.plan.pools:
            if pool.role == "encode":
                encoders = self.members.encoders
                queue, running = sum(len(each.queue) for each in encoders), sum(len(each.batch) for each in encoders)
                found.append(Stage("encode", queue, running, len(encoders)))
            else:
                instances = self.members.active[pool.role]
                running = sum(len(each.engine.running) for each in instances)
                queue = sum(each.requests for each in instances) - running
                found.append(Stage(pool.role, queue, running, len(instances)))
        return found

    def _pool(self, role: Role) -> list[Instance] | list[Encoder]:
        return self.members.encoders if role == "encode" else self.members.active[role]

    def _allowed(self, switch: Switch) -> bool:
        floor = max(1, self.switching.floor.get(switch.source, 1))
        return switch.source != switch.target and len(self._pool(switch.source)) > floor

    def _drain(self, switch: Switch, now: float) -> None:
        self._switch, self._decided = switch, now
        leaving = self._pool(switch.source).pop()
        leaving.draining, self._leaving = True, leaving
        if isinstance(leaving, Encoder):
            assert self.members.stage is not None
            self.members.stage.redistribute(leaving, now)
        self.check(now)

    def check(self, now: float) -> None:
        """Something ended or was fetched: whether the engine that drains has nothing left."""
        leaving, switch = self._leaving, self._switch
        if leaving is None or switch is None or not leaving.drained:
            return
        self._leaving, leaving.until = None, now
        if isinstance(leaving, Encoder):
            leaving.cache.clear()
        cost, rank, decided = self.switching.cost(switch.source, switch.target), leaving.place.rank, self._decided

        def ended(then: float, version: int) -> None:
            self.made.append(Switched(switch.source, switch.target, decided, now, then))
            self._switch = None
            self.members.add(switch.target, rank, then)
            if switch.target == "encode" and self.members.stage is not None:
                self.members.stage.rebalance(then)

        self.clock.post(now + cost, Event.SWITCHED, 0, len(self.made), ended)
