"""What the order costs the tail, and kappa that follows it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sched_requests import Ask, Clock, Known, of, policy

from vllm_dler.config import AdaptiveSettings
from vllm_dler.kappa import Controller, short_suffering
from vllm_dler.order import Arrivals, Tracked
from vllm_dler.waits import Wait, Waits

LENGTHS = {"class:short": 20.0, "class:long": 1000.0}


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 9)), max_size=60), st.randoms(use_true_random=False))
def test_in_the_order_of_arrival_both_waits_are_one(steps: list[tuple[bool, float]], rng: random.Random) -> None:
    waits, arrivals, now = Waits(1000), Arrivals(), 0.0
    waiting: list[Tracked] = []
    for comes, gap in steps:
        now += gap
        if comes or not waiting:
            state = Tracked(Ask(), *arrivals.next(now, now))
            waits.arrived(state)
            waiting.append(state)
        elif rng.random() < 0.2:
            waits.left(waiting.pop(rng.randrange(len(waiting))))
        else:
            waits.admitted(waiting.pop(0), now)
    assert len(waits) == len(waiting)
    assert waits.overtakes == 0
    assert all(wait.seconds == wait.in_turn for wait in waits.window)
    assert waits.oldest_s(now) == (now - waiting[0].arrival if waiting else 0)


def test_in_another_order_the_turns_stay_those_of_arrival() -> None:
    waits, arrivals = Waits(10), Arrivals()
    first, second, third = (Tracked(Ask(), *arrivals.next(t, t)) for t in (0.0, 1.0, 2.0))
    for state in (first, second, third):
        waits.arrived(state)
    waits.admitted(third, 10.0)
    waits.left(first)  # whose turn has been: the second one's turn passes with it
    waits.admitted(second, 12.0)
    assert [(wait.seconds, wait.in_turn) for wait in waits.window] == [(8.0, 10.0), (11.0, 10.0)]
    assert waits.overtakes == 1


def controller(**settings: Any) -> Controller:
    return Controller(AdaptiveSettings(enabled=True, period_s=1.0, **settings), 0.0)


def waited(rows: list[tuple[float, float, float]]) -> Waits:
    waits = Waits(1000)
    waits.window.extend(Wait(*row) for row in rows)
    return waits


def test_kappa_falls_while_the_tail_is_out_of_its_bound() -> None:
    late = waited([(1.0, 10.0, 10.0)] * 99 + [(40.0, 10.0, 1000.0)] * 5)
    assert controller(step=2.0).decide(0.04, late, 2.0) == 0.02
    assert controller(step=2.0, minimum=0.03).decide(0.04, late, 2.0) == 0.03
    assert controller(step=2.0, tail_s=50.0).decide(0.04, late, 2.0) >= 0.04
    assert controller(step=2.0).decide(0.04, late, 0.5) == 0.04
    assert Controller(AdaptiveSettings(), 0.0).decide(0.04, late, 99.0) == 0.04


def test_kappa_rises_while_short_ones_suffer() -> None:
    turns = waited([(10.0, 10.0, 10.0), (10.0, 10.0, 1000.0)] * 30)
    assert short_suffering(list(turns.window)) == pytest.approx(100)
    assert controller(step=2.0).decide(0.04, turns, 2.0) == 0.08
    assert controller(step=2.0, maximum=0.05).decide(0.04, turns, 2.0) == 0.05
    fair = waited([(1.0, 10.0, 10.0), (10.0, 10.0, 100.0)] * 30)
    assert controller(step=2.0).decide(0.04, fair, 2.0) == 0.04
    idle = waited([(0.0, 0.0, 10.0), (0.0, 0.0, 1000.0)] * 30)
    assert controller(step=2.0).decide(0.04, idle, 2.0) == 0.04


def test_a_kappa_that_falls_takes_waiting_keys_along_and_one_that_rises_does_not() -> None:
    clock = Clock()
    one = policy({"adaptive": {"enabled": True, "period_s": 1, "step": 2.0, "tail_s": 1.0}}, Known(LENGTHS), clock)
    ask = of("long", 1000.0, num_prompt_tokens=0)
    state = one.arrived(ask, 0)
    one.queue().add_request(ask)
    assert state.key == pytest.approx(1020.0)
    one.waits.window.extend([Wait(5.0, 5.0, 10.0)] * 20)
    clock.now += 2
    one.begin_step()
    assert one.placement.rule.kappa == 0.01
    assert state.key == pytest.approx(1010.0)
    one.placement.rule.kappa = 1.0
    one.placement.renew()
    one.begin_step()
    assert state.key == pytest.approx(1010.0)
