"""What length-aware scheduling is for, on the real scheduler and a virtual clock: small, but fails if a rule is gone.

The bounds are far from what comes out, and the clock is virtual, so that no machine is too slow for them.
"""

from __future__ import annotations

import random
import statistics

import pytest
from replay_cases import make_policy
from replay_engine import EngineSettings, Outcome, replay
from replay_harness import STEPS
from replay_report import percentile
from replay_traces import Row
from replay_workload import Room, capacity

ROOM = Room(blocks=400, seqs=16)


def rows(load: float, labels: bool = True, count: int = 300) -> list[Row]:
    """Two classes, answers of 20 and of 400 tokens in the mean, as many of each."""
    draw = random.Random(5)
    work = [
        Row(0.0, draw.randrange(16, 400), max(1, int(draw.expovariate(1 / mean))), str(mean) if labels else "")
        for mean in (draw.choice((20, 400)) for _ in range(count))
    ]
    rate = load * capacity(work, ROOM, STEPS)
    at, timed = 0.0, []
    for row in work:
        timed.append(Row(at, row.prompt, row.output, row.label))
        at += draw.expovariate(rate)
    return timed


def served(policy: str, work: list[Row], ahead: bool = False) -> Outcome:
    settings, client = make_policy(policy, EngineSettings(room=ROOM, ahead=ahead))
    return replay(work, settings, STEPS, client)


def tail(outcome: Outcome) -> float:
    return percentile(sorted(outcome.latency), 0.99)


@pytest.mark.parametrize("ahead", [False, True])
def test_in_overload_the_mean_falls_and_the_tail_does_not_pay_for_it(ahead: bool) -> None:
    work = rows(1.3)
    fcfs, ours = served("fcfs", work, ahead), served("ours", work, ahead)
    assert statistics.fmean(ours.latency) < 0.75 * statistics.fmean(fcfs.latency)
    assert tail(ours) < 1.15 * tail(fcfs)
    assert max(ours.latency) < 1.2 * max(fcfs.latency)
    assert ours.preemptions < 0.5 * fcfs.preemptions
    assert ours.recomputed < 0.75 * fcfs.recomputed


def test_with_places_free_nothing_changes() -> None:
    work = rows(0.4)
    fcfs, ours = served("fcfs", work), served("ours", work)
    assert statistics.fmean(ours.latency) == pytest.approx(statistics.fmean(fcfs.latency), rel=0.01)
    assert tail(ours) == pytest.approx(tail(fcfs), rel=0.01)


def test_without_classes_nothing_is_lost() -> None:
    work = rows(1.3, labels=False)
    fcfs, ours = served("fcfs", work), served("ours", work)
    assert statistics.fmean(ours.latency) < 1.05 * statistics.fmean(fcfs.latency)
    assert tail(ours) < 1.1 * tail(fcfs)


def test_strength_zero_is_vllms_own_order() -> None:
    work = rows(1.3, count=120)
    fcfs, ours = served("fcfs", work), served("ours:boost.strength=0", work)
    assert ours.latency == fcfs.latency
    assert ours.preemptions == fcfs.preemptions
