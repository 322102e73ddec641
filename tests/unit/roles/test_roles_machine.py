"""Two controllers with a Lease, instances and every fault between them, as hypothesis finds them.

The deciders, the Lease, the rules and the state machine of instances are the real ones. Engines, network and API server
are scripted: a look and a request each take a while, in which anything else may happen.
"""

from __future__ import annotations

import copy
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vllm_suite.identity import Role
from vllm_suite.kube.client import KubeError
from vllm_suite.planner.simulator.switching import epd_rule
from vllm_suite.roles.client import TIMEOUT_S
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.controller import SURE_S
from vllm_suite.roles.decider import Decider, Move
from vllm_suite.roles.lease import Lease
from vllm_suite.roles.seen import Seen
from vllm_suite.roles.state import Deadlines, Refused, RoleState, advance, begin, died, fail, tick

LIMITS = Deadlines(closing=5, drained=2, switching=3, verified=2, restoring=2)
LONGEST = 5 + 2 + 3 + 2 + 2
BETWEEN = ("closing", "drained", "switching", "verified", "restoring")
# What the machine is to keep, said here once more: it does not ask the code how long a phase may take, or what is next.
AT_MOST = {"closing": 5, "drained": 2, "switching": 3, "verified": 2, "restoring": 2}
NEXT = {"closing": "drained", "drained": "switching", "switching": "verified", "verified": "serving"}
STEP_S = 5.0
FLOOR = {"prefill": 2, "decode": 3}
SPEC = RolesSpec.model_validate({"agree": 1, "hold": 3, "floor": FLOOR, "start": {"prefill": 2, "decode": 2}})
CAN = ("prefill", "decode", "any")


class Api:
    """A Lease at an API server that may be cut off, for everybody or for one."""

    def __init__(self) -> None:
        self.stored: dict[str, Any] | None = None
        self.cut_off: set[str] = set()

    def of(self, who: str) -> Any:
        return _Kube(self, who)


@dataclass
class _Kube:
    api: Api
    who: str

    def _open(self) -> None:
        if self.who in self.api.cut_off:
            raise KubeError(0, "no answer")

    async def get(self, resource: Any, name: str) -> dict[str, Any]:
        self._open()
        if self.api.stored is None:
            raise KubeError(404, "none")
        return copy.deepcopy(self.api.stored)

    async def create(self, resource: Any, body: dict[str, Any]) -> dict[str, Any]:
        self._open()
        if self.api.stored is not None:
            raise KubeError(409, "there")
        self.api.stored = {**body, "metadata": {"resourceVersion": 1}}
        return self.api.stored

    async def replace(self, resource: Any, name: str, body: dict[str, Any]) -> dict[str, Any]:
        self._open()
        assert self.api.stored is not None
        version = self.api.stored["metadata"]["resourceVersion"]
        if body["metadata"]["resourceVersion"] != version:
            raise KubeError(409, "old")
        self.api.stored = {**body, "metadata": {"resourceVersion": version + 1}}
        return self.api.stored


def now_of(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine that waits for nothing returns."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


@dataclass
class Instance:
    state: RoleState = field(default_factory=lambda: RoleState("any"))
    life: int = 0
    serving_at: float = 0.0
    entered: float = 0.0  # when its phase began
    had: set[Role] = field(default_factory=set)  # in any life


@dataclass
class Controller:
    """`look` and `request` are under way or just back, with the time when they began."""

    decider: Decider
    lease: Lease
    name: str
    leads: bool = False
    look: tuple[float, int, list[Seen]] | None = None
    request: tuple[float, int, Move] | None = None
    asked: set[tuple[int, int]] = field(default_factory=set)  # instances and lives, for a former role


class Fleet(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.losses = 0
        self.api = Api()
        roles: tuple[Role, ...] = ("prefill", "prefill", "prefill", "decode", "decode", "decode")
        self.instances = [Instance(RoleState(role)) for role in roles]
        self.queues = {"prefill": 0, "decode": 0, "any": 0}
        self.lives = 0
        self.controllers = [self._controller(), self._controller()]
        self.switches = 0

    def _controller(self) -> Controller:
        self.lives += 1
        name = f"c{self.lives}"
        return Controller(Decider(SPEC, epd_rule), Lease(self.api.of(name), "llm", name, 6, lambda: self.now), name)

    def _ready(self, role: str, without: int = -1) -> int:
        return sum(
            one.state.role == role and one.state.phase == "serving"
            for i, one in enumerate(self.instances)
            if i != without
        )

    def _becomes(self, one: Instance, state: RoleState) -> None:
        before, one.state = one.state, state
        one.had |= {before.role, state.role}
        self.losses += before.phase != state.phase == "out"
        if (before.phase, before.attempt) != (state.phase, state.attempt):
            one.entered = self.now
        if state.epoch != before.epoch:
            assert (before.phase, state.phase, state.role) == ("verified", "serving", before.target)
            self.switches += 1
        else:
            assert state.role == before.role

    @rule(seconds=st.sampled_from((1.0, 2.0, STEP_S)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for one in self.instances:
            self._becomes(one, tick(one.state, self.now, LIMITS))
            phase = one.state.phase
            assert phase not in BETWEEN or self.now - one.entered < AT_MOST[phase], "nothing outlives its deadline"
        for controller in self.controllers:
            # A client gives up.
            if controller.look is not None and self.now - controller.look[0] > 2 * TIMEOUT_S:
                controller.look = None
            if controller.request is not None and self.now - controller.request[0] > TIMEOUT_S:
                controller.decider.begun(controller.request[2], self.now)
                controller.request = None

    @rule(prefill=st.sampled_from((0, 20)), decode=st.sampled_from((0, 20)))
    def load(self, prefill: int, decode: int) -> None:
        self.queues.update(prefill=prefill, decode=decode)

    @rule(i=st.integers(0, 5))
    def a_phase_is_done(self, i: int) -> None:
        one = self.instances[i]
        before, entered = one.state, one.entered
        self._becomes(one, advance(before, before.attempt, before.phase, self.now, LIMITS))
        if before.phase not in BETWEEN:
            assert one.state == before
        elif self.now - entered < AT_MOST[before.phase]:
            assert one.state.phase == NEXT.get(before.phase, "serving")
            assert one.state.epoch == before.epoch + (before.phase == "verified")
        else:
            # News that come late are no success, and what was touched is put back first.
            late = {"closing": "serving", "drained": "serving", "restoring": "out"}
            assert (one.state.phase, one.state.epoch) == (late.get(before.phase, "restoring"), before.epoch)

    @rule(phases=st.integers(0, 3), seconds=st.sampled_from((2.0, STEP_S)))
    def a_switch_is_held_up(self, phases: int, seconds: float) -> None:
        """After some phases the process stands still: the next news come before its clock is looked at again."""
        for i in range(6):
            for _ in range(phases):
                self.a_phase_is_done(i)
        self.now += seconds
        for i in range(6):
            self.a_phase_is_done(i)
        self.time_passes(0.0)

    @rule(i=st.integers(0, 5), late=st.booleans())
    def a_phase_fails(self, i: int, late: bool) -> None:
        one = self.instances[i]
        before = one.state
        self._becomes(one, fail(before, before.attempt - late, "fault", self.now, LIMITS))
        if late or before.phase not in BETWEEN:
            assert one.state == before
        else:
            then = {"switching": "restoring", "verified": "restoring", "restoring": "out"}
            assert one.state.phase == then.get(before.phase, "serving")

    @rule(i=st.integers(0, 5))
    def an_engine_dies(self, i: int) -> None:
        self._becomes(self.instances[i], died(self.instances[i].state))
        assert self.instances[i].state.phase == "out"

    @rule(i=st.integers(0, 5))
    def an_instance_is_restarted(self, i: int) -> None:
        one = self.instances[i]
        self.losses += 1
        one.had.add(one.state.role)
        one.state, one.life = RoleState("any"), one.life + 1

    @rule(c=st.integers(0, 1))
    def it_looks(self, c: int) -> None:
        one = self.controllers[c]
        if one.request is not None:
            return
        leads = now_of(one.lease.hold()) == "leader" and one.lease.left() >= SURE_S
        if leads and not one.leads:
            one.decider.took_over(self.now)
        one.leads, one.look = leads, None
        if leads:
            one.look = (self.now, self.losses, [self._seen(i) for i in range(6)])

    def _seen(self, i: int) -> Seen:
        one = self.instances[i]
        ready = one.state.phase == "serving"
        return Seen(str(i), "", str(one.life), one.state.role, one.state.epoch, one.state.phase, ready, CAN,
                    self.queues[one.state.role], 0)  # fmt: skip

    @rule(c=st.integers(0, 1))
    def it_decides(self, c: int) -> None:
        one = self.controllers[c]
        if one.look is None or one.request is not None:
            return
        (_, losses, fleet), one.look = one.look, None
        one.decider.see(fleet, self.now)
        move = one.decider.decide(fleet, self.now)
        if move is not None and one.lease.left() >= SURE_S:
            one.request = (self.now, losses, move)

    @rule(c=st.integers(0, 1), lost=st.booleans())
    def its_request_arrives(self, c: int, lost: bool) -> None:
        one = self.controllers[c]
        if one.request is None:
            return
        _, losses, move = one.request
        index = int(move.instance.instance_id)
        instance = self.instances[index]
        if move.why == "again":
            assert move.target in instance.had
            if not lost:
                assert (index, int(move.instance.epoch)) not in one.asked, "a former role is asked for once"
                one.asked.add((index, int(move.instance.epoch)))
        if move.instance.epoch == str(instance.life):
            try:
                begun = begin(instance.state, move.target, move.instance.role_epoch, self.now, LIMITS)
                self._becomes(instance, begun)
            except Refused:
                pass
            else:
                # What went down since the look could not be known.
                spare = self.losses - losses
                source = move.instance.role
                if source != "any":
                    assert self._ready(source, index) + spare >= FLOOR[source]
                if move.target != "decode":
                    assert self._ready("decode", index) + self._ready("any", index) + spare >= 1
        if not lost:
            one.decider.begun(move, self.now)
            one.request = None

    @rule(c=st.integers(0, 1))
    def a_round_without_a_fault(self, c: int) -> None:
        self.it_looks(c)
        self.it_decides(c)
        self.its_request_arrives(c, False)

    @rule(phases=st.integers(1, 4))
    def a_switch_goes_on(self, phases: int) -> None:
        for i in range(6):
            for _ in range(phases):
                self.a_phase_is_done(i)

    @rule(c=st.integers(0, 1), phases=st.integers(0, 3), seconds=st.sampled_from((2.0, STEP_S)))
    def a_controllers_switch_is_held_up(self, c: int, phases: int, seconds: float) -> None:
        """All the way there, since by chance few runs get so far."""
        self.load(0, 20)
        self.a_round_without_a_fault(c)
        self.time_passes(STEP_S)
        self.a_round_without_a_fault(c)
        self.a_switch_is_held_up(phases, seconds)

    @rule()
    def nothing_happens_for_long(self) -> None:
        for _ in range(6):
            self.time_passes(STEP_S)

    @rule(c=st.integers(0, 1))
    def a_controller_dies(self, c: int) -> None:
        roles = [(one.state.role, one.state.phase) for one in self.instances]
        # What it sent may still arrive, or not: the case where it does is a request of the other one's lifetime.
        self.controllers[c] = self._controller()
        assert [(one.state.role, one.state.phase) for one in self.instances] == roles

    @rule(c=st.integers(0, 1))
    def a_controller_ends(self, c: int) -> None:
        now_of(self.controllers[c].lease.release())
        self.controllers[c] = self._controller()

    @rule(c=st.integers(0, 1))
    def the_api_is_cut_off(self, c: int) -> None:
        self.api.cut_off.add(self.controllers[c].name)

    @precondition(lambda self: self.api.cut_off)
    @rule()
    def the_api_is_back(self) -> None:
        self.api.cut_off.clear()

    @invariant()
    def one_switch_at_a_time(self) -> None:
        assert sum(one.state.phase in BETWEEN for one in self.instances) <= 1

    @invariant()
    def one_leads(self) -> None:
        assert sum(controller.lease.left() > 0 for controller in self.controllers) <= 1

    @invariant()
    def nobody_stays_in_between(self) -> None:
        for one in self.instances:
            if one.state.phase not in BETWEEN:
                one.serving_at = self.now
            assert self.now - one.serving_at <= LONGEST + 5 * STEP_S

    def teardown(self) -> None:
        """Everything heals and a load comes: the fleet follows it, without anybody's help."""
        self.api.cut_off.clear()
        for i in range(6):
            self.an_instance_is_restarted(i)
        self.queues.update(prefill=0, decode=20)
        for _ in range(400):
            self.time_passes(0.5)
            for c in (0, 1):
                self.it_looks(c)
                self.it_decides(c)
                self.its_request_arrives(c, False)
            for i in range(6):
                self.a_phase_is_done(i)
            self.one_switch_at_a_time()
        assert (self._ready("prefill"), self._ready("decode")) == (2, 4)


Fleet.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestFleet = Fleet.TestCase
