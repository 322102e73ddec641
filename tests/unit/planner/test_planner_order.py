"""The length-aware order of simulated engines: by hand, and what it does to an overloaded engine."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from simulated import ExactSource

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.jobs import FirstCome, Job, SimulationError, WaitingQueue
from vllm_suite.planner.simulator.order import LengthOrder
from vllm_suite.planner.simulator.pool import simulate


def taught(order: LengthOrder, **lengths: int) -> LengthOrder:
    """With lengths of classes known from eight jobs each."""
    for label, output in lengths.items():
        for number in range(8):
            order.left(Job(-number - 1, 0.0, 10, output, label=label), 1.0)
    return order


def drain(order: LengthOrder, now: float) -> list[int]:
    return [(order.peek(now), order.pop(now).number)[1] for _ in range(len(order))]


def test_with_nothing_known_the_first_comes_first() -> None:
    order = LengthOrder("kappa")
    for number in range(3):
        order.push(Job(number, float(number), 10, 1 + number), 5.0)
    assert drain(order, 5.0) == [0, 1, 2]


def test_a_token_is_worth_kappa_seconds() -> None:
    # About 1000 tokens against 10 at 0.02 s: the short one goes first where it comes less than some 20 s later.
    for later, expected in ((15.0, [1, 0]), (25.0, [0, 1])):
        order = taught(LengthOrder("kappa"), long=1000, short=10)
        order.push(Job(0, 100.0, 10, 1000, label="long"), 100.0)
        order.push(Job(1, 100.0 + later, 10, 10, label="short"), 100.0 + later)
        assert drain(order, 130.0) == expected


def test_what_is_learned_reaches_those_that_wait_and_keys_only_fall() -> None:
    order = taught(LengthOrder("kappa"), a=1000, b=500)
    order.push(Job(0, 100.0, 10, 5, label="a"), 100.0)
    order.push(Job(1, 100.0, 10, 5, label="b"), 100.0)
    assert order.peek(100.0).number == 1
    for number in range(40):
        order.left(Job(-number - 1, 0.0, 10, 5, label="a"), 101.0)
    assert order.peek(101.0).number == 0
    for number in range(80):
        order.left(Job(-number - 1, 0.0, 10, 60_000, label="a"), 102.0)
    assert order.peek(110.0).number == 0


def test_one_that_lost_its_cache_goes_back_to_its_place() -> None:
    order = taught(LengthOrder("kappa"), x=100)
    jobs = [Job(number, 100.0 + number, 10, 100, label="x") for number in range(3)]
    for job in jobs:
        order.push(job, job.arrival)
    first = order.pop(103.0)
    first.generated = 5
    order.push_back(first, 104.0)
    assert drain(order, 104.0) == [0, 1, 2]


def test_the_boost_is_bounded() -> None:
    order = taught(LengthOrder("boost", max_boost_s=10.0), long=1000, short=10)
    for number in range(32):
        order.push(Job(number, 0.0, 10, 1, label="long" if number % 2 else "short"), 0.0)
        order.left(
            Job(-1 - number, -10.0, 10, 1000 if number % 2 else 10, label="long" if number % 2 else "short"), 0.0
        )
    drain(order, 0.0)
    order.push(Job(100, 100.0, 10, 1, label="long"), 100.0)
    # Latencies of 10 s: the long one goes forward by some 4 s, a short one by 16 s, of which 10 are allowed.
    order.push(Job(101, 105.0, 10, 1, label="short"), 105.0)
    order.push(Job(102, 108.0, 10, 1, label="short"), 108.0)
    assert drain(order, 108.0) == [101, 100, 102]


@pytest.mark.parametrize("rule", ["kappa", "boost"])
def test_in_overload_the_mean_falls(rule: str) -> None:
    draw, at, rows = random.Random(3), 0.0, []
    for number in range(400):
        at += draw.expovariate(0.6)
        label, mean = draw.choice([("s", 4), ("l", 80)])
        rows.append((number, at, 16, max(1, int(draw.expovariate(1 / mean))), label))

    def mean_latency(queue: WaitingQueue) -> float:
        jobs = [Job(*row[:4], label=row[4]) for row in rows]
        limits = Limits(1000, max_num_seqs=16)
        simulate(jobs, ExactSource(1.0, 0.01), limits, lambda job, now: None, queue=lambda: queue)
        return statistics.fmean(job.last_token - job.arrival for job in jobs)

    assert mean_latency(LengthOrder(rule, kappa=5.0)) < 0.8 * mean_latency(FirstCome())  # type: ignore[arg-type]


def test_another_rule_is_refused() -> None:
    with pytest.raises(SimulationError, match="boost or kappa"):
        LengthOrder("sjf")  # type: ignore[arg-type]


def test_defaults_are_the_plugins() -> None:
    import vllm_dler.placement as placement
    import vllm_dler.rules as rules
    import vllm_suite.planner.simulator.order as simulated
    from vllm_dler.config import SchedulerSettings

    plugin, ours = SchedulerSettings(), LengthOrder()
    assert (ours.rule, ours.kappa, ours.strength) == (plugin.rule, plugin.kappa, plugin.boost.strength)
    assert (ours.max_boost_s, ours.prefill_weight) == (plugin.boost.max_boost_s, plugin.prefill_weight)
    constants = (simulated._RELEARN_EVERY, simulated._RELEARN_S, simulated._SHARE)
    assert constants == (plugin.relearn_every, plugin.relearn_s, placement._SHARE)
    assert (simulated._WINDOW, simulated._EVERY) == (rules._WINDOW, rules._EVERY)
    assert (simulated._QUANTILE, simulated._STEEPNESS) == (rules._SHARE, rules._STEEPNESS)
    assert simulated._MOST == rules._MOST


def test_a_prefill_instance_keeps_nothing_of_jobs_that_left() -> None:
    """Lengths are learned where answers end; where only prompts are computed, places in the queue are forgotten."""
    clock, order, known = Clock(), LengthOrder("kappa"), list[int]()

    def finished(job: Job, now: float) -> None:
        engine.release(job.held, now, job)
        known.append(len(order._known))

    engine = Engine(clock, ExactSource(), Limits(40), finished, waiting=order, prefill_only=True)
    clock.feed((Job(number, number * 8.0, 64, 2) for number in range(500)), engine.accept)
    clock.run()
    assert len(known) == 500
    assert max(known) < 80
    assert known[-1] == 0


def _admissions(order: WaitingQueue, *, cache: int = 8) -> list[float]:
    """When three jobs of 32 + 40 tokens begin that come together, with a cache of so many blocks of 16 tokens."""
    jobs = [Job(number, 0.0, 32, 40, label="x") for number in range(3)]
    simulate(jobs, ExactSource(), Limits(cache), lambda job, now: None, queue=lambda: order)
    return [job.first_scheduled for job in jobs]


def test_an_admission_leaves_room_for_those_that_run() -> None:
    # Each prompt takes two blocks. Those that begin in one step do not count yet for one another, so all three do
    # where nothing has begun before.
    assert _admissions(LengthOrder()) == [0.0] * 3
    # With nothing known each has room of 16 tokens; expected 400, a share of 0.1 is 40 tokens, or three blocks.
    for order, room in ((LengthOrder(), 1), (taught(LengthOrder(), x=400), 3), (LengthOrder(headroom_tokens=0), 0)):
        order.push(first := Job(9, 0.0, 32, 40, label="x"), 0.0)
        order.pop(0.0)
        order.admitted(first)
        assert -(-order.headroom // 16) == room
        waits = [begun > 0.0 for begun in _admissions(order, cache=6)]
        # Nobody runs when the first begins; after it, four blocks are free, and two after the second.
        assert waits == {0: [False, False, False], 1: [False, False, True], 3: [False, True, True]}[room]
        order.stopped(first)
        assert order.headroom == 0
    # Where nobody runs no room is kept, however small the cache; and a running job has 64 tokens at most.
    order = taught(LengthOrder(), x=5000)
    order.push(first, 0.0)
    order.pop(0.0)
    order.admitted(first)
    assert order.headroom == 64
    assert min(_admissions(order, cache=5)) == 0.0


def test_room_is_that_of_what_was_expected_at_arrival_and_of_what_remains_later() -> None:
    order = taught(LengthOrder(headroom_tokens=1000, headroom_share=0.5), x=100)
    job = Job(0, 10.0, 10, 100, label="x")
    order.push(job, 10.0)
    assert order.pop(10.0) is job
    expected = order.lengths.remaining(("class:x",), 0, 1 << 16)
    assert expected == pytest.approx(100, rel=0.2)
    for number in range(400):
        order.left(Job(-number - 1, 0.0, 10, 1000, label="x"), 11.0)
    order.admitted(job)
    assert order.headroom == math.ceil(0.5 * expected)
    order.stopped(job)
    # It lost its cache after 10 tokens: what is known by now.
    job.generated = 10
    order.admitted(job)
    assert order.headroom > 300
    order.left(job, 12.0)
    order.stopped(job)
    assert order.headroom == 0
    assert not order._expected


@pytest.mark.parametrize(("victims", "loser"), [(True, 0), (False, 1)])
def test_who_has_most_to_come_for_what_is_lost_gives_way(victims: bool, loser: int) -> None:
    # Both have 33 tokens after the first one; the cache has six blocks, and a seventh is needed at 49.
    order = taught(LengthOrder(headroom_tokens=0, victims=victims), long=1000, short=40)
    jobs = [Job(0, 10.0, 32, 40, label="long"), Job(1, 10.0, 32, 40, label="short")]
    simulate(jobs, ExactSource(), Limits(6), lambda job, now: None, queue=lambda: order)
    assert [job.preemptions for job in jobs] == [int(job.number == loser) for job in jobs]


def test_who_gave_way_too_often_does_so_last() -> None:
    order = taught(LengthOrder(max_evictions=2), long=1000, short=40)
    long, short = Job(0, 0.0, 32, 500, label="long"), Job(1, 0.0, 32, 40, label="short")
    assert order.standing(long, 10) > order.standing(short, 10)
    long.preemptions = 2
    assert order.standing(long, 30) < order.standing(short, 30)
    # Its score holds for 16 tokens.
    assert order.standing(long, 45)[1] == order.standing(long, 30)[1] != order.standing(long, 46)[1]


def test_headroom_saves_preemptions() -> None:
    def preempted(**more: int) -> int:
        draw, now, jobs = random.Random(0), 0.0, list[Job]()
        for number in range(120):
            now += draw.expovariate(0.2)
            jobs.append(Job(number, now, 40, draw.randint(20, 300), label="x"))
        queue = LengthOrder(**more)
        (engine,) = simulate(
            jobs, ExactSource(), Limits(60, async_scheduling=True), lambda job, now: None, queue=lambda: queue
        ).engines
        assert queue.headroom == 0
        assert not queue._rooms
        return engine.preemptions

    assert preempted() < 0.7 * preempted(headroom_tokens=0)
