"""Engines that change their role while a fleet runs: when (a policy), and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vllm_suite.planner.plan import Role


@dataclass(frozen=True)
class Stage:
    """A pool as a policy sees it.

    Attributes:
        queue: requests (encode: items) that wait for this stage and are on no engine's step.
        running: those that are.
        engines: that take work; one that drains is none of them.
    """

    role: Role
    queue: int
    running: int
    engines: int


@dataclass(frozen=True)
class Switch:
    """One engine of `source` is to become one of `target`."""

    source: Role
    target: Role


class Policy(Protocol):
    """Whether an engine is to change its role now. Asked only while no switch is under way."""

    def __call__(self, stages: Sequence[Stage], now: float) -> Switch | None: ...


def epd_rule(stages: Sequence[Stage], now: float = 0.0) -> Switch | None:
    """EPD's published rule on queues (arXiv 2501.05460, as its repository has it).

    The engine goes to the stage with the longest queue, unless every stage's queue is at least half as long as that. It
    comes from the other stage with a shorter queue that has most engines to spare, and at least two.
    """
    longest = max(stage.queue for stage in stages)
    if all(stage.queue >= longest / 2 for stage in stages):
        return None
    target = next(stage for stage in stages if stage.queue == longest)
    sources = [stage for stage in stages if stage is not target and stage.queue < longest and stage.engines >= 2]
    if not sources:
        return None
    source = max(sources, key=lambda stage: stage.engines - 1)
    return Switch(source.role, target.role)


@dataclass(frozen=True)
class GoodputPolicy:
    """A seam: a policy from predicted goodput. `choose` is asked with the stages and answers as a policy does."""

    choose: Callable[[Sequence[Stage], float], Switch | None]

    def __call__(self, stages: Sequence[Stage], now: float) -> Switch | None:
        return self.choose(stages, now)


def epd_cost(source: Role, target: Role) -> float:
    """EPD's figure for one switch: below 0.7 s."""
    return 0.7


@dataclass(frozen=True)
class Switching:
    """Role switching of a simulated fleet.

    A switch takes the last engine of its pool out of the router, waits until it has nothing left (an encoder's waiting
    items go to the others), takes `cost` seconds, and puts an engine of the new role to the end of the other pool. One
    switch at a time.

    Attributes:
        policy: asked every `every` seconds.
        cost: seconds by the two roles.
        floor: engines that a pool keeps; 1 where it is not named.
    """

    policy: Policy = epd_rule
    every: float = 5.0
    cost: Callable[[Role, Role], float] = epd_cost
    floor: Mapping[Role, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Switched:
    """One switch that was made: when it was decided, when the engine was drained, and when it served again."""

    source: Role
    target: Role
    decided: float
    drained: float
    ended: float
