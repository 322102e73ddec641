"""What the controller does about a fleet: pure, from one look to one switch at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_suite.identity import Role
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.former import Former
from vllm_suite.roles.rules import Policy, Stage, Switch
from vllm_suite.roles.seen import Seen

ROLES: tuple[Literal["encode", "prefill", "decode"], ...] = ("encode", "prefill", "decode")
BACK = 4
"""The way back has to wait so many times `hold`."""

Held = Literal["switching", "rule", "queue", "floor", "agree", "hold", "nobody"]


@dataclass(frozen=True)
class Move:
    """Make `instance` a `target`: it had that role before it was restarted (`again`), or as `start` or a rule say."""

    instance: Seen
    target: Role
    why: Literal["again", "start", "rule"]


class Decider:
    """One controller's memory. Floors hold for instances that are ready: one that is out counts for nothing."""

    def __init__(self, spec: RolesSpec, rule: Policy) -> None:
        self._spec = spec
        self._rule = rule
        self._asked: Switch | None = None
        self._times = 0
        self._last: Switch | None = None
        self._last_at = float("-inf")
        self._given: dict[str, float] = {}  # when an instance without a role was last asked to take one
        self._former = Former()
        self.held: Held | None = None

    def see(self, fleet: Sequence[Seen], now: float) -> None:
        """A look, before any question; those that show a part of the fleet too."""
        self._former.see(fleet, now)

    def decide(self, fleet: Sequence[Seen], now: float) -> Move | None:
        """The switch to make now; `held` says why there is none."""
        move = None
        self.held = None
        if any(one.phase not in ("serving", "out") for one in fleet):
            self.held = "switching"
        else:
            able = [one for one in fleet if one.ready and one.phase == "serving"]
            # One that went back to `any` would fail again: each attempt closes it for as long as its requests take.
            self._given = {name: at for name, at in self._given.items() if now - at < self._spec.hold}
            move = self._again(able) or self._start(able) or self._by_rule(able, now)
        return move

    def begun(self, move: Move, now: float) -> None:
        """The instance has begun it."""
        self._asked, self._times = None, 0
        if move.why == "rule":
            self._last = Switch(move.instance.role, move.target)
            # Made without those that are away: what they did before may be what there is enough of now.
            self._former.clear()
        else:
            self._given[move.instance.instance_id] = now
            self._former.forget(move.instance)
        self._last_at = now

    def refused(self, move: Move) -> None:
        """The instance has not begun it. A former role is asked for once."""
        if move.why == "again":
            self._former.forget(move.instance)

    def took_over(self, now: float) -> None:
        """From another controller, which may have made a switch just now."""
        self._asked, self._times, self._last_at = None, 0, now
        self._former.clear()

    def _again(self, able: Sequence[Seen]) -> Move | None:
        start, floor = self._spec.start, self._spec.floor
        low = {role for role in ROLES if _count(able, role) < min(start.of(role), floor.of(role))}
        for one in self._free(able):
            role = self._former.of(one)
            # What another role lacks comes first: `start` gives it.
            if role in one.can and not low - {role} and (role == "decode" or _takes_whole(able) > 1):
                return Move(one, role, "again")
        return None

    def _start(self, able: Sequence[Seen]) -> Move | None:
        for role in ("prefill", "decode", "encode"):
            if _count(able, role) >= self._spec.start.of(role):
                continue
            free = [one for one in self._free(able) if role in one.can]
            # Until decode has its own, somebody has to take whole requests.
            if free and (role == "decode" or _takes_whole(able) > 1):
                return Move(free[0], role, "start")
        return None

    def _free(self, able: Sequence[Seen]) -> list[Seen]:
        return [one for one in able if one.role == "any" and one.instance_id not in self._given]

    def _by_rule(self, able: Sequence[Seen], now: float) -> Move | None:
        # Encoding is a stage of its own only where somebody does nothing else; else those of role `any` do it.
        stages = [self._stage(role, able) for role in ROLES if role != "encode" or _count(able, role)]
        switch = self._rule(stages, now)
        if switch is None:
            return self._hold("rule")
        asked = next(stage for stage in stages if stage.role == switch.target)
        source = next(stage for stage in stages if stage.role == switch.source)
        if self._spec.rule == "epd" and asked.queue < self._spec.least_queue:
            return self._hold("queue")
        free = [one for one in able if one.role == "any" and switch.target in one.can]
        if not free and source.engines <= self._spec.floor.of(switch.source):
            return self._hold("floor")
        self._times = self._times + 1 if switch == self._asked else 1
        self._asked = switch
        if self._times < self._spec.agree:
            self.held = "agree"
            return None
        wait = self._spec.hold
        if self._last is not None and (switch.source, switch.target) == (self._last.target, self._last.source):
            wait *= BACK
        if now - self._last_at < wait:
            self.held = "hold"
            return None
        movable = free or [one for one in able if one.role == switch.source and switch.target in one.can]
        if not movable:
            return self._hold("nobody")
        # One without a role is nobody's loss. Else the one with least to finish is drained soonest.
        instance = min(movable, key=lambda one: (one.running + one.queue, one.instance_id))
        return Move(instance, switch.target, "rule")

    def _hold(self, why: Held) -> Move | None:
        self.held = why
        self._asked, self._times = None, 0
        return None

    @staticmethod
    def _stage(role: Literal["encode", "prefill", "decode"], able: Sequence[Seen]) -> Stage:
        pool = [one for one in able if one.role == role]
        return Stage(role, sum(one.queue for one in pool), sum(one.running for one in pool), len(pool))


def _count(able: Sequence[Seen], role: Role) -> int:
    return sum(one.role == role for one in able)


def _takes_whole(able: Sequence[Seen]) -> int:
    return _count(able, "any") + _count(able, "decode")
