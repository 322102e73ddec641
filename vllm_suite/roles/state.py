"""The state machine of one instance's role: pure, with a deadline for every wait.

::

    serving -> closing -> drained -> switching -> verified -> serving    role changed, epoch + 1
                  |          |           |            |
                  +----------+           +------------+--> restoring -> serving    old role, same epoch
                  v                                            |
               serving    old role, same epoch                 +--> out    ends with the process

Until `drained` nothing of the engine was touched, so a failure simply opens the old role again. From `switching` on the
old settings are put back first; where that fails too, the instance is out. Whoever drives the machine calls `tick` from
time to time; no phase but `serving` and `out` outlives its deadline.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from vllm_suite.identity import Role

Phase = Literal["serving", "closing", "drained", "switching", "verified", "restoring", "out"]
Stage = Literal["encode", "prefill", "decode"]
"""What a request wants of an instance."""

STAGES: tuple[Stage, ...] = ("encode", "prefill", "decode")
_UNTOUCHED = ("closing", "drained")


class Refused(ValueError):
    """A switch that was not begun. `reason`: `stale`, `busy`, `out` or `noop`; nothing has changed."""

    def __init__(self, reason: Literal["stale", "busy", "out", "noop"], text: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Deadlines:
    """Seconds that each phase may take. All positive."""

    closing: float = 120.0
    drained: float = 10.0
    switching: float = 20.0
    verified: float = 5.0
    restoring: float = 10.0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not 0 < seconds < math.inf:
                raise ValueError(f"deadline {name} must be a positive number of seconds, not {seconds!r}")

    def of(self, phase: Phase) -> float:
        """Seconds of a phase; infinite for `serving` and `out`."""
        return float(getattr(self, phase, math.inf))


@dataclass(frozen=True)
class RoleState:
    """One instance.

    Attributes:
        role: that it has, or had before the switch under way.
        epoch: switches that ended well, since the process began.
        target: the new role while a switch is under way.
        attempt: switches begun. What is reported of an earlier attempt is ignored.
        deadline: when the phase ends at the latest, on the caller's clock.
        failure: why the last attempt failed; None where it did not.
    """

    role: Role
    epoch: int = 0
    phase: Phase = "serving"
    target: Role | None = None
    attempt: int = 0
    deadline: float = math.inf
    failure: str | None = None

    def accepts(self, stage: Stage | None) -> bool:
        """Whether a new request of this stage is taken now; None is one that does not say its stage."""
        return self.phase == "serving" and (stage is None or serves(self.role, stage))


def serves(role: Role, stage: Stage) -> bool:
    """Whether the role does that work. A decode instance computes prompts too where it decodes them itself."""
    return role in ("any", stage)


def begin(state: RoleState, target: Role, expected_epoch: int, now: float, deadlines: Deadlines) -> RoleState:
    """Close the instance to become `target`. Raises `Refused`."""
    if state.phase == "out":
        raise Refused("out", f"the instance is out ({state.failure}); restart it")
    if state.phase != "serving":
        raise Refused("busy", f"a switch to {state.target} is {state.phase}")
    if expected_epoch != state.epoch:
        raise Refused("stale", f"the role epoch is {state.epoch}, not {expected_epoch}")
    if target == state.role:
        raise Refused("noop", f"the role is {target} already")
    begun = replace(state, target=target, attempt=state.attempt + 1, failure=None)
    return _enter(begun, "closing", now, deadlines)


def advance(state: RoleState, attempt: int, done: Phase, now: float, deadlines: Deadlines) -> RoleState:
    """What phase `done` of an attempt waited for has happened. Ignored where that is not the phase now, and late
    news count as a missed deadline."""
    if attempt != state.attempt or done != state.phase:
        return state
    state = tick(state, now, deadlines)
    if state.phase != done:
        return state
    match done:
        case "closing":
            return _enter(state, "drained", now, deadlines)
        case "drained":
            return _enter(state, "switching", now, deadlines)
        case "switching":
            return _enter(state, "verified", now, deadlines)
        case "verified":
            assert state.target is not None
            return replace(_serve(state), role=state.target, epoch=state.epoch + 1)
        case "restoring":
            return _serve(state)
    return state


def fail(state: RoleState, attempt: int, reason: str, now: float, deadlines: Deadlines) -> RoleState:
    """The phase under way failed. Ignored outside a switch and for an earlier attempt."""
    if attempt != state.attempt or state.phase in ("serving", "out"):
        return state
    if state.phase in _UNTOUCHED:
        return replace(_serve(state), failure=reason)
    if state.phase == "restoring":
        return _out(state, f"{state.failure}; then {reason}")
    return _enter(replace(state, failure=reason), "restoring", now, deadlines)


def tick(state: RoleState, now: float, deadlines: Deadlines) -> RoleState:
    """Time has passed: a phase past its deadline has failed."""
    if now < state.deadline:
        return state
    return fail(state, state.attempt, f"{state.phase} took longer than {deadlines.of(state.phase):g} s", now, deadlines)


def died(state: RoleState) -> RoleState:
    """The engine has ended."""
    return state if state.phase == "out" else _out(state, "the engine has ended")


def _enter(state: RoleState, phase: Phase, now: float, deadlines: Deadlines) -> RoleState:
    return replace(state, phase=phase, deadline=now + deadlines.of(phase))


def _serve(state: RoleState) -> RoleState:
    return replace(state, phase="serving", target=None, deadline=math.inf)


def _out(state: RoleState, failure: str) -> RoleState:
    return replace(state, phase="out", target=None, deadline=math.inf, failure=failure)
