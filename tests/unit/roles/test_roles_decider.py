"""What the controller decides: floors, hysteresis, one at a time, whatever fails."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_suite.planner.simulator.switching import Stage, Switch, epd_rule
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.decider import Decider, Move
from vllm_suite.roles.rules import goodput_rule
from vllm_suite.roles.seen import Seen
from vllm_suite.roles.state import Deadlines, RoleState, advance, begin, died, fail, tick

CAN = ("prefill", "decode", "any")


def seen(name: str, role: str, queue: int = 0, running: int = 0, **over: object) -> Seen:
    fields = {"phase": "serving", "ready": True, "can": CAN, "role_epoch": 0, **over}
    return Seen(name, f"http://{name}", "e", role, queue=queue, running=running, **fields)  # type: ignore[arg-type]


def fleet(prefill: Sequence[int], decode: Sequence[int]) -> list[Seen]:
    """With these queues."""
    return [seen(f"p{i}", "prefill", q) for i, q in enumerate(prefill)] + [
        seen(f"d{i}", "decode", q) for i, q in enumerate(decode)
    ]


def decider(**over: object) -> Decider:
    return Decider(RolesSpec.model_validate({"agree": 1, "hold": 0, **over}), epd_rule)


def test_the_longest_queue_gets_the_instance_with_least_to_do() -> None:
    now = [seen("p0", "prefill", 9), seen("d0", "decode", 0, 5), seen("d1", "decode", 0, 2)]
    move = decider().decide(now, 0.0)
    assert move is not None
    assert (move.instance.instance_id, move.target, move.why) == ("d1", "prefill", "rule")


@pytest.mark.parametrize(
    ("now", "over", "held"),
    [
        (fleet([0], [0, 0]), {}, "rule"),
        (fleet([3], [0, 0]), {}, "queue"),
        (fleet([9], [0]), {}, "rule"),  # the rule leaves the last one
        (fleet([9], [0, 0]), {"floor": {"decode": 2}}, "floor"),
        (fleet([9], [0, 0]), {"agree": 2}, "agree"),
        ([*fleet([9], [0, 0]), seen("x", "decode", phase="closing", ready=False)], {}, "switching"),
        ([seen("p0", "prefill", 9), seen("d0", "decode", can=("decode",)), seen("d1", "decode", can=())], {}, "nobody"),
        ([*fleet([9], [0]), seen("d1", "decode", ready=False)], {}, "rule"),
        ([*fleet([9], [0]), seen("d1", "decode", phase="out", ready=False)], {}, "rule"),
    ],
)
def test_what_holds_it_back(now: list[Seen], over: dict[str, object], held: str) -> None:
    one = decider(**over)
    assert one.decide(now, 0.0) is None
    assert one.held == held


def test_it_takes_several_looks_in_a_row_and_a_pause() -> None:
    one, busy, calm = decider(agree=3, hold=10), fleet([9], [0, 0, 0]), fleet([0], [0, 0, 0])
    found = [one.decide(look, float(t)) for t, look in enumerate([busy, busy, calm, busy, busy, busy])]
    assert [move is not None for move in found] == [False] * 5 + [True]
    one.begun(found[-1], 5.0)  # type: ignore[arg-type]
    times = [t for t in range(6, 40) if one.decide(busy, float(t))]
    assert times[0] == 15
    # The way back takes four times as long.
    back = fleet([0, 0], [9, 0])
    assert next(t for t in range(6, 80) if one.decide(back, float(t))) == 45


def test_roles_are_given_to_those_without_one() -> None:
    one = decider(start={"prefill": 1, "decode": 2})
    now = [seen(f"i{i}", "any") for i in range(4)]
    for expected in ("prefill", "decode", "decode"):
        move = one.decide(now, 0.0)
        assert move is not None
        assert (move.target, move.why) == (expected, "start")
        one.begun(move, 0.0)
        now = [seen(o.instance_id, move.target if o == move.instance else o.role) for o in now]
    assert one.decide(now, 0.0) is None
    # The last that can decode does not become a prefill.
    assert decider(start={"prefill": 1}).decide([seen("i0", "any")], 0.0) is None


def test_one_that_went_back_is_not_asked_again_at_once() -> None:
    """Each attempt closes it until its requests have ended."""
    one = decider(start={"prefill": 1}, hold=30)
    now = [seen("i0", "any"), seen("i1", "any")]
    asked = []
    for at in range(0, 70, 5):
        move = one.decide(now, float(at))
        if move is not None:
            asked.append((at, move.instance.instance_id))
            one.begun(move, float(at))
    assert asked == [(0, "i0"), (5, "i1"), (30, "i0"), (35, "i1"), (60, "i0"), (65, "i1")]


def restarted(one: Seen, **over: object) -> Seen:
    return replace(one, epoch=one.epoch + "+", role="any", role_epoch=0, **over)  # type: ignore[arg-type]


def test_one_that_was_restarted_gets_its_role_again_once() -> None:
    one = decider(start={"prefill": 1, "decode": 3}, hold=30)
    now = [seen("i0", "prefill"), seen("i1", "prefill"), seen("i2", "decode"), seen("i3", "decode")]
    one.see(now, 0.0)
    assert one.decide(now, 0.0) is None
    # While it is away, and while it is not ready, nothing is known of it but what it was.
    one.see(now[1:], 1.0)
    now[0] = restarted(now[0], ready=False)
    one.see(now, 2.0)
    assert one.decide(now, 2.0) is None
    now[0] = replace(now[0], ready=True)
    one.see(now, 3.0)
    move = one.decide(now, 3.0)
    # `start` alone would have made it the third that decodes.
    assert move is not None
    assert (move.instance.instance_id, move.target, move.why) == ("i0", "prefill", "again")
    one.begun(move, 3.0)
    one.see(now, 4.0)
    assert one.decide(now, 4.0) is None
    # It went back to `any`: from here on it is one without a role.
    one.see(now, 40.0)
    late = one.decide(now, 40.0)
    assert late is not None
    assert (late.target, late.why) == ("decode", "start")


def _by_hand(one: Decider, now: list[Seen]) -> None:
    one.see([replace(now[0], role="any", role_epoch=1), *now[1:]], 1.0)


def _rule(one: Decider, now: list[Seen]) -> None:
    one.see(now[1:], 1.0)
    one.begun(Move(now[1], "prefill", "rule"), 1.0)
    one.see(now[1:], 1.0)


def _refused(one: Decider, now: list[Seen]) -> None:
    one.refused(Move(now[0], "prefill", "again"))


@pytest.mark.parametrize(
    ("meanwhile", "at"),
    [
        (_by_hand, 2.0),
        (_rule, 2.0),
        (_refused, 2.0),
        (lambda one, now: one.took_over(1.0), 2.0),
        (lambda one, now: one.see(now[1:], 1.0), 3601.0),
    ],
    ids=["made any by hand", "a switch by the rule without it", "it refused", "another led", "away for an hour"],
)
def test_a_former_role_that_is_out_of_date(meanwhile: Callable[[Decider, list[Seen]], None], at: float) -> None:
    one, now = decider(), [seen("i0", "prefill"), seen("i1", "decode"), seen("i2", "decode")]
    one.see(now, 0.0)
    again = [restarted(now[0]), *now[1:]]
    known = copy.deepcopy(one)
    meanwhile(one, now)
    for each, wanted in ((known, Move(again[0], "prefill", "again")), (one, None)):
        when = at if each is one else 2.0
        each.see(again, when)
        assert each.decide(again, when) == wanted


@pytest.mark.parametrize(
    ("now", "over", "wanted"),
    [
        (["decode", "decode", "prefill"], {}, "decode again"),
        (["decode", "decode"], {}, "decode again"),
        # A role below its floor comes first, where the start is to have it.
        (["decode", "decode"], {"start": {"prefill": 1}}, "prefill start"),
        # The last that takes whole requests does not prefill.
        (["prefill", "prefill"], {}, None),
        (["prefill", "any"], {}, "prefill again"),
        (["encode", "decode"], {}, None),  # it cannot any more
    ],
)
def test_a_former_role_within_what_a_fleet_needs(now: list[str], over: dict[str, object], wanted: str | None) -> None:
    one, fleet = decider(**over), [seen(f"i{i}", role) for i, role in enumerate(now)]
    one.see(fleet, 0.0)
    fleet[0] = restarted(fleet[0])
    one.see(fleet, 1.0)
    move = one.decide(fleet, 1.0)
    assert (f"{move.target} {move.why}" if move else None) == wanted


def test_a_goodput_rule_weighs_the_gain_against_the_cost() -> None:
    def predict(counts: dict[str, int]) -> float:
        return min(counts["prefill"] * 4.0, counts["decode"] * 1.0)

    stages = [Stage("prefill", 0, 0, 3), Stage("decode", 0, 0, 3)]
    rule = goodput_rule(predict, lambda a, b: 2.0, horizon=60.0)  # type: ignore[arg-type]
    assert rule(stages, 0.0) == Switch("prefill", "decode")
    dear = goodput_rule(predict, lambda a, b: 60.0, horizon=60.0)  # type: ignore[arg-type]
    assert dear(stages, 0.0) is None
    best = [Stage("prefill", 0, 0, 1), Stage("decode", 0, 0, 4)]
    assert rule(best, 0.0) is None
    little = goodput_rule(predict, lambda a, b: 2.0, horizon=60.0, least_gain=0.5)  # type: ignore[arg-type]
    assert little(stages, 0.0) is None


LIMITS = Deadlines(closing=5, drained=2, switching=3, verified=2, restoring=2)
NEXT = ("closing", "drained", "switching", "verified", "restoring")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 3), st.floats(0, 0.4))
def test_controller_and_instances_with_faults(seed: int, floor_p: int, floor_d: int, faults: float) -> None:
    """Floors hold for what serves, one switch at a time, and every switch ends, whatever fails and whoever dies."""
    rng = random.Random(seed)
    states = [RoleState("prefill") for _ in range(3)] + [RoleState("decode") for _ in range(4)]
    one = decider(floor={"prefill": floor_p, "decode": floor_d}, agree=2, hold=3)
    now, since = 0.0, 0.0
    for _ in range(150):
        now += rng.choice((0.5, 1.0, 4.0))
        for i, state in enumerate(states):
            states[i] = tick(states[i], now, LIMITS)
            if states[i].phase in NEXT and rng.random() < 0.6:
                if rng.random() < faults:
                    states[i] = fail(states[i], states[i].attempt, "fault", now, LIMITS)
                else:
                    states[i] = advance(states[i], states[i].attempt, states[i].phase, now, LIMITS)
            if rng.random() < faults / 100:
                states[i] = died(state)
        queues = {"prefill": rng.choice((0, 0, 20)), "decode": rng.choice((0, 0, 20))}
        looks = [
            seen(str(i), s.role, queues[s.role], role_epoch=s.epoch, phase=s.phase, ready=s.phase == "serving")
            for i, s in enumerate(states)
        ]
        moving = [s for s in states if s.phase in NEXT]
        assert len(moving) <= 1
        since = since if moving else now
        assert now - since <= 5 + 2 + 3 + 2 + 2 + 4 * 5
        move = one.decide(looks, now)
        if move is None:
            continue
        assert not moving
        serving = sum(look.role == move.instance.role and look.ready for look in looks)
        assert serving - 1 >= {"prefill": floor_p, "decode": floor_d}[move.instance.role]
        index = int(move.instance.instance_id)
        # The answer to the request may be lost: the next look tells.
        states[index] = begin(states[index], move.target, move.instance.role_epoch, now, LIMITS)
        if rng.random() > faults:
            one.begun(Move(move.instance, move.target, move.why), now)
