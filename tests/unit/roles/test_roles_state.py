"""One instance's role: every order of events, faults and lost time."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from vllm_suite.roles.state import Deadlines, Refused, RoleState, advance, begin, died, fail, serves, tick

LIMITS = Deadlines(closing=10, drained=4, switching=5, verified=2, restoring=3)
ROLES = st.sampled_from(["any", "encode", "prefill", "decode"])
PHASES = st.sampled_from(["closing", "drained", "switching", "verified", "restoring"])
ORDER = ("closing", "drained", "switching", "verified")


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.state = RoleState("decode")
        self.now = 0.0
        self.entered = 0.0
        self.passed: list[str] = []  # phases that ended well, of this attempt
        self.before = self.state

    def become(self, new: RoleState) -> None:
        old, self.before = self.state, self.state
        self.state = new
        if new == old:
            return
        if new.attempt != old.attempt:
            self.passed = []
        self.entered_before = self.entered
        if new.phase != old.phase:
            self.entered = self.now
        if new.epoch != old.epoch:
            # Only the whole way gives another role.
            assert new.epoch == old.epoch + 1
            assert new.role == old.target != old.role
            assert self.passed == [*ORDER[:3]]
            assert (old.phase, new.phase) == ("verified", "serving")
            assert self.now < self.entered_before + LIMITS.verified
        else:
            assert new.role == old.role
        if new.phase == "restoring" and old.phase != "restoring":
            assert old.phase in ("switching", "verified")
        if old.phase in ("switching", "verified") and new.phase == "serving":
            assert new.epoch == old.epoch + 1  # never back without the old settings put back
        if old.phase == "out":
            assert new == old

    @rule(target_role=ROLES, off=st.integers(-1, 1))
    def ask(self, target_role: str, off: int) -> None:
        old = self.state
        new, refusal = old, None
        try:
            new = begin(old, target_role, old.epoch + off, self.now, LIMITS)  # type: ignore[arg-type]
        except Refused as refused:
            refusal = refused
        if refusal is not None:
            wanted = "out" if old.phase == "out" else "busy" if old.phase != "serving" else "stale" if off else "noop"
            assert refusal.reason == wanted
            assert wanted != "noop" or target_role == old.role
            return
        assert old.phase == "serving"
        assert off == 0
        assert not any(new.accepts(stage) for stage in (None, "encode", "prefill", "decode"))
        self.become(new)

    @rule(late=st.integers(0, 1), done=PHASES)
    def news(self, late: int, done: str) -> None:
        old = self.state
        new = advance(old, old.attempt - late, done, self.now, LIMITS)  # type: ignore[arg-type]
        if late or done != old.phase:
            assert new == old
        elif self.now < old.deadline and done in ORDER[:3]:
            self.passed.append(done)
        self.become(new)

    @rule(late=st.sampled_from((0, 0, 0, 1)))
    def right_news(self, late: int) -> None:
        if self.state.phase not in ("serving", "out"):
            self.news(late, self.state.phase)

    @rule(seconds=st.floats(0, 12))
    def news_of_a_process_that_was_held_up(self, seconds: float) -> None:
        """They come before anybody looks at the clock."""
        self.now += seconds
        self.right_news(0)

    @rule(late=st.integers(0, 1))
    def fault(self, late: int) -> None:
        old = self.state
        new = fail(old, old.attempt - late, "fault", self.now, LIMITS)
        if late:
            assert new == old
        self.become(new)

    @rule(seconds=st.floats(0, 12))
    def time(self, seconds: float) -> None:
        self.now += seconds
        self.become(tick(self.state, self.now, LIMITS))

    @rule(often=st.integers(0, 9))
    def death(self, often: int) -> None:
        if often == 0:
            self.become(died(self.state))
            assert self.state.phase == "out"

    @invariant()
    def never_in_between(self) -> None:
        state = self.state
        waiting = state.phase not in ("serving", "out")
        assert waiting == (state.target is not None) == (state.deadline < float("inf"))
        if waiting:
            assert state.deadline == self.entered + LIMITS.of(state.phase)
            # Whatever is lost, two deadlines later it serves or is out.
            later = tick(state, state.deadline, LIMITS)
            later = tick(later, later.deadline, LIMITS) if later.phase == "restoring" else later
            assert later.phase in ("serving", "out")
            assert (later.role, later.epoch) == (state.role, state.epoch)
        if state.phase == "serving":
            for stage in ("encode", "prefill", "decode"):
                assert state.accepts(stage) is serves(state.role, stage)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def run(state: RoleState, target: str, *phases: str, now: float = 0.0) -> RoleState:
    state = begin(state, target, state.epoch, now, LIMITS)  # type: ignore[arg-type]
    for phase in phases:
        state = advance(state, state.attempt, phase, now, LIMITS)  # type: ignore[arg-type]
    return state


def test_there_and_back() -> None:
    there = run(RoleState("decode"), "prefill", *ORDER)
    assert (there.role, there.epoch, there.phase) == ("prefill", 1, "serving")
    assert there.accepts("prefill")
    assert not there.accepts("decode")
    assert run(there, "decode", *ORDER).epoch == 2


@pytest.mark.parametrize(
    ("phases", "then"), [((), "serving"), (ORDER[:1], "serving"), (ORDER[:2], "restoring"), (ORDER[:3], "restoring")]
)
def test_where_a_failure_leads(phases: tuple[str, ...], then: str) -> None:
    state = run(RoleState("decode"), "prefill", *phases)
    failed = fail(state, state.attempt, "the probe", 0.0, LIMITS)
    assert (failed.phase, failed.role, failed.epoch, failed.failure) == (then, "decode", 0, "the probe")
    if then == "restoring":
        assert advance(failed, failed.attempt, "restoring", 1.0, LIMITS).phase == "serving"
        assert tick(failed, 3.0, LIMITS).phase == "out"


def test_news_after_the_deadline_are_no_success() -> None:
    state = run(RoleState("decode"), "prefill", *ORDER[:2])
    late = advance(state, state.attempt, "switching", 5.0, LIMITS)
    assert late.phase == "restoring"
    assert late.failure == "switching took longer than 5 s"


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_is_positive(seconds: float) -> None:
    with pytest.raises(ValueError, match="deadline closing"):
        Deadlines(closing=seconds)
