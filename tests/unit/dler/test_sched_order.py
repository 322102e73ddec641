"""The order of waiting requests: what the key promises, and that no request is lost over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sched_requests import Ask, Clock, Known, of, policy

from vllm_dler.config import BoostSettings
from vllm_dler.rules import BoostRule

LENGTHS = {"class:short": 10.0, "class:long": 1000.0, "class:longer": 3000.0}


def drained(queue: Any) -> list[Any]:
    """Requests in the order in which they leave; each is looked at before it is taken."""
    found = []
    while queue:
        first = queue.peek_request()
        assert queue.pop_request() is first
        found.append(first)
    return found


def filled(asks: list[Ask], **options: Any) -> list[Any]:
    """The order of requests that arrive in this order and are known to the policy."""
    clock = Clock()
    one = policy(clock=clock, **options)
    queue = one.queue()
    for ask in asks:
        one.arrived(ask, 0)
        queue.add_request(ask)
    one.begin_step()
    return drained(queue)


def test_short_ones_go_first_within_the_window() -> None:
    long, early, late = of("long", 900.0), of("short", 910.0), of("short", 925.0)
    # A prompt of 10 is 2.5 tokens of size: the long one's key is 920.05.
    assert filled([long, early, late], lengths=Known(LENGTHS)) == [early, long, late]


def test_the_users_priority_goes_before_the_key() -> None:
    asks = [of("long", 900.0, priority=0), of("short", 900.0, priority=1), of("short", 900.0, priority=-1)]
    assert filled(asks, lengths=Known(LENGTHS), by_priority=True) == [asks[2], asks[0], asks[1]]
    asks = [of("long", 900.0, priority=0), of("short", 900.0, priority=1)]
    assert filled(asks, lengths=Known(LENGTHS)) == [asks[1], asks[0]]


def test_a_cached_prompt_is_no_work() -> None:
    one = policy(lengths=Known(LENGTHS))
    cold = one.arrived(of("short", 900.0, num_prompt_tokens=4000), 0)
    warm = one.arrived(of("short", 900.0, num_prompt_tokens=4000), 3000)
    assert (cold.size, warm.size) == (10 + 1000, 10 + 250)
    assert warm.key == pytest.approx(900.0 + 0.02 * 260)


def test_max_tokens_cuts_the_estimate_and_is_none() -> None:
    one = policy(lengths=Known(LENGTHS))
    assert one.arrived(of("long", max_tokens=50, num_prompt_tokens=0), 0).size == 50
    assert one.arrived(of("short", max_tokens=50_000, num_prompt_tokens=0), 0).size == 10
    assert policy(lengths=Known({})).arrived(of("long", max_tokens=5), 0).size == 0
    small = policy(lengths=Known(LENGTHS), max_model_len=120)
    assert small.arrived(of("long", num_prompt_tokens=100), 100).size == 20


def test_where_nothing_is_known_the_order_is_that_of_coming() -> None:
    asks = [Ask(t, num_prompt_tokens=n) for t, n in ((30.0, 500), (10.0, 1), (20.0, 90), (20.0, 1))]
    # The second one's stamp says that it was there before the first, which had come already.
    assert filled(asks) == asks


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.sampled_from(["short", "long", "longer"]), st.integers(0, 3000)), max_size=40
    ),
    st.sampled_from([0.001, 0.02, 0.1]),
)
def test_nobody_is_overtaken_from_outside_his_window(rows: list[tuple[float, str, int]], kappa: float) -> None:
    asks = [of(name, 900 + gap, num_prompt_tokens=n) for gap, name, n in sorted(rows)]
    order = filled(asks, settings={"kappa": kappa}, lengths=Known(LENGTHS))
    assert sorted(map(id, order)) == sorted(map(id, asks))
    place = {id(ask): n for n, ask in enumerate(order)}
    sizes = {
        id(ask): LENGTHS[f"class:{ask.xargs['dler_class']}"] + 0.25 * ask.num_prompt_tokens for ask in asks if ask.xargs
    }
    for first in asks:
        for second in asks:
            if second.arrival_time > first.arrival_time + kappa * sizes[id(first)] + 1e-6:
                assert place[id(first)] < place[id(second)]


@given(st.lists(st.floats(0, 3000), min_size=1, max_size=12), st.lists(st.floats(0.0, 0.2), min_size=1, max_size=5))
def test_a_key_never_rises_whatever_is_learned(estimates: list[float], kappas: list[float]) -> None:
    known = Known({"class:short": 500.0})
    one = policy(lengths=known)
    queue = one.queue()
    ask = of("short", 900.0)
    state = one.arrived(ask, 0)
    queue.add_request(ask)
    last = math.inf
    for n, estimate in enumerate(estimates):
        known.lengths["class:short"] = estimate
        one.placement.rule.kappa = kappas[n % len(kappas)]
        one.finished(_ended(one), "stop")
        one.placement._learned = one.settings.relearn_every
        one.begin_step()
        assert 900.0 <= state.deadline == state.key <= last
        last = state.key
    assert queue.peek_request() is ask


def _ended(one: Any) -> Ask:
    ask = of("other")
    one.arrived(ask, 0)
    ask.num_output_tokens = 3
    return ask


def test_what_is_learned_reaches_who_waits_and_ranks_stand_still_in_between() -> None:
    clock = Clock()
    known = Known({"class:a": 100.0, "class:b": 200.0})
    one = policy({"relearn_every": 1000, "relearn_s": 5}, known, clock)
    queue = one.queue()
    asks = [of("a", 900.0), of("b", 900.0)]
    for ask in asks:
        one.arrived(ask, 0)
        queue.add_request(ask)
    one.begin_step()
    known.lengths["class:b"] = 50.0
    one.finished(_ended(one), "stop")
    assert queue.peek_request() is asks[0]
    clock.now += 4
    one.begin_step()
    assert list(queue) == asks
    clock.now += 2
    one.begin_step()
    assert list(queue) == drained(queue) == asks[::-1]


class Model:
    """A queue under random use, beside the plain list that it has to agree with."""

    def __init__(self, kappa: float, lengths: dict[str, float]) -> None:
        self.clock = Clock()
        self.policy = policy({"kappa": kappa, "relearn_every": 3}, Known(lengths), self.clock)
        self.queue = self.policy.queue()
        self.waiting: list[Ask] = []
        self.running: list[Ask] = []

    def add(self, name: str, gap: float) -> None:
        self.clock.now += gap
        ask = of(name, self.clock.now)
        self.policy.arrived(ask, 0)
        self.queue.add_request(ask)
        self.waiting.append(ask)

    def admit(self) -> None:
        if self.waiting:
            ask = self.queue.pop_request()
            self.waiting.remove(ask)
            self.running.append(ask)
            self.policy.admitted([ask.request_id])

    def skip(self, count: int) -> None:
        """As vLLM passes over requests that cannot start: taken out, and put back at the end of the step."""
        taken = [self.queue.pop_request() for _ in range(min(count, len(self.queue)))]
        self.queue.prepend_requests(reversed(taken))

    def preempt(self, index: int) -> None:
        if self.running:
            ask = self.running.pop(index % len(self.running))
            ask.num_output_tokens += 7
            self.policy.evicted(ask, "kv_full")
            self.queue.prepend_request(ask)
            self.waiting.append(ask)

    def finish(self, index: int) -> None:
        if self.running:
            ask = self.running.pop(index % len(self.running))
            ask.num_output_tokens += 1
            self.policy.finished(ask, "stop")

    def abort(self, indices: list[int]) -> None:
        """vLLM hands both queues the requests of either."""
        gone = {id(self.waiting[i % len(self.waiting)]) for i in indices} if self.waiting else set()
        out = [ask for ask in self.waiting if id(ask) in gone]
        self.waiting = [ask for ask in self.waiting if id(ask) not in gone]
        self.queue.remove_requests([*out, *self.running[:1]])
        for ask in out:
            self.policy.finished(ask, "abort")

    def check(self) -> None:
        assert len(self.queue) == len(self.waiting) == len(list(self.queue))
        assert bool(self.queue) == bool(self.waiting)
        assert {id(ask) for ask in self.queue} == {id(ask) for ask in self.waiting}
        if self.waiting:
            assert self.queue.peek_request() is next(iter(self.queue))
        assert set(self.policy._states) == {ask.request_id for ask in (*self.waiting, *self.running)}


NAMES = st.sampled_from(["short", "long", "longer"])
STEPS = st.one_of(
    st.tuples(st.just("add"), NAMES, st.floats(0, 5)),
    st.tuples(st.just("admit")),
    st.tuples(st.just("skip"), st.integers(0, 4)),
    st.tuples(st.just("preempt"), st.integers(0, 9)),
    st.tuples(st.just("finish"), st.integers(0, 9)),
    st.tuples(st.just("abort"), st.lists(st.integers(0, 9), max_size=3)),
)


@settings(max_examples=150)
@given(st.lists(STEPS, max_size=60), st.sampled_from([0.005, 0.02]))
def test_no_request_is_lost_or_doubled(steps: list[tuple[Any, ...]], kappa: float) -> None:
    model = Model(kappa, LENGTHS)
    for name, *arguments in steps:
        model.policy.begin_step()
        getattr(model, name)(*arguments)
        model.check()
    left = drained(model.queue)
    assert {id(ask) for ask in left} == {id(ask) for ask in model.waiting}
    ranks = [model.policy.tracked(ask).rank for ask in left]
    assert ranks == sorted(ranks)


@settings(max_examples=60)
@given(st.lists(STEPS, max_size=60))
def test_where_nothing_is_known_it_is_first_come_first_served(steps: list[tuple[Any, ...]]) -> None:
    model = Model(0.02, {})
    for name, *arguments in steps:
        model.policy.begin_step()
        getattr(model, name)(*arguments)
        assert list(model.queue) == sorted(model.waiting, key=lambda ask: model.policy.tracked(ask).seq)


def test_a_name_that_is_used_again_and_a_session_that_goes_on_leave_no_trace() -> None:
    one = policy(lengths=Known(LENGTHS))
    queue = one.queue()
    first, between, again = of("short", 900.0, request_id="x"), of("short", 910.0), of("short", 920.0, request_id="x")
    for ask in (first, between):
        one.arrived(ask, 0)
        queue.add_request(ask)
    queue.remove_requests([first])
    one.finished(first, "abort")
    one.arrived(again, 0)
    queue.add_request(again)
    assert drained(queue) == [between, again]
    session, other = of("short", 920.0, session_id="s"), of("short", 930.0)
    for ask in (session, other):
        one.arrived(ask, 0)
        queue.add_request(ask)
    session.arrival_time, session.num_computed_tokens = 940.0, 10
    one.renewed(session)
    one.begin_step()
    assert drained(queue) == [other, session]
    assert len(one.waits) == 4


def test_an_empty_queue_says_so() -> None:
    queue = policy().queue()
    with pytest.raises(IndexError):
        queue.peek_request()
    with pytest.raises(IndexError):
        queue.pop_request()
    with pytest.raises(ValueError, match="is not in the queue"):
        queue.remove_request(Ask())


def test_husks_do_not_pile_up() -> None:
    one = policy()
    queue = one.queue()
    for _ in range(2000):
        ask = Ask()
        queue.add_request(ask)
        queue.remove_requests([ask])
        one.finished(ask, "abort")
    assert len(queue._heap) < 100
    assert len(one._states) == 0


# -- rule boost


def boosted(strength: float = 0.75, most: float = 300.0, latency: float = 40.0) -> BoostRule:
    """A rule that has seen sizes of 100 on average, and latencies."""
    rule = BoostRule(BoostSettings(strength=strength, max_boost_s=most))
    for _ in range(16):
        rule.arrived(100.0)
        rule.finished(latency)
    return rule


def test_the_boost_is_that_of_the_formula() -> None:
    rule = boosted()
    assert rule.scale == 30.0
    for size in (1.0, 50.0, 100.0, 500.0):
        shape = min(2.0, -math.log(1 - math.exp(-size / 200)))
        assert rule.offset(size) == pytest.approx(-30 * shape)
    assert rule.offset(1.0) == -60.0
    assert -1 < rule.offset(1000.0) < 0
    assert boosted(most=20.0).offset(1.0) == -20.0
    assert boosted(strength=0.0).offset(1.0) == rule.offset(0.0) == 0.0


def test_no_boost_until_enough_is_known() -> None:
    rule = BoostRule(BoostSettings())
    for _ in range(15):
        rule.arrived(100.0)
        rule.finished(40.0)
        assert rule.offset(1.0) == 0
    rule.arrived(100.0)
    rule.arrived(0.0)  # not known, so no part of the mean
    assert rule.offset(1.0) == 0
    rule.finished(40.0)
    assert rule.offset(1.0) == -72


@given(
    st.lists(st.tuples(st.floats(0, 90), st.sampled_from(["short", "long", "longer"])), max_size=40),
    st.sampled_from([1.0, 20.0, 300.0]),
)
def test_nobody_goes_forward_by_more_than_the_most(rows: list[tuple[float, str]], most: float) -> None:
    one = policy({"rule": "boost", "boost": {"max_boost_s": most}}, Known(LENGTHS))
    one.placement.rule = rule = boosted(most=most)
    rule.arrived = lambda size: None  # type: ignore[method-assign]  # scales that stand still
    queue = one.queue()
    asks = [of(name, 900 + gap) for gap, name in sorted(rows)]
    for ask in asks:
        one.arrived(ask, 0)
        queue.add_request(ask)
    order = drained(queue)
    place = {id(ask): n for n, ask in enumerate(order)}
    assert len(order) == len(asks)
    for first in asks:
        for second in asks:
            if second.arrival_time > first.arrival_time + most:
                assert place[id(first)] < place[id(second)]
    longer = [ask.arrival_time for ask in order if ask.xargs == {"dler_class": "longer"}]
    assert longer == sorted(longer)


def test_the_policy_learns_the_scales() -> None:
    clock = Clock()
    one = policy({"rule": "boost"}, Known(LENGTHS), clock)
    assert one.report()["gauges"]["boost_seconds"] == [[[], 0.0]]
    for n in range(40):
        ask = of("long" if n % 2 else "short", clock.now)
        one.arrived(ask, 0)
        clock.now += 20
        ask.num_output_tokens = 5
        one.begin_step()
        one.finished(ask, ("stop", "length", "repetition")[n % 3])  # type: ignore[arg-type]
    assert one.report()["gauges"]["boost_seconds"] == [[[], 18.0]]
    long, short = of("long", clock.now - 5), of("short", clock.now)
    states = [one.arrived(ask, 0) for ask in (long, short)]
    assert states[1].deadline < states[0].deadline <= long.arrival_time
    aborted = [of("long", clock.now - 500) for _ in range(32)]
    for ask in aborted:
        one.arrived(ask, 0)
        one.finished(ask, "abort")
    assert one.report()["gauges"]["boost_seconds"] == [[[], 18.0]]


def test_requests_that_are_alike_are_estimated_once_between_two_looks() -> None:
    clock, known = Clock(), Known(LENGTHS)
    asked: list[tuple[str, ...]] = []
    answer = known.remaining

    def remaining(keys: Sequence[str], age: int, cap: int, **more: Any) -> float | None:
        asked.append(tuple(keys))
        return answer(keys, age, cap, **more)

    known.remaining = remaining  # type: ignore[method-assign]
    one = policy({"relearn_every": 2, "relearn_s": 1e9}, known, clock)
    first = [one.arrived(of(label, 0.0), 0).predicted for label in ("short", "long", "short", "long", "short")]
    assert len(asked) == 2
    assert len(set(first)) == 2
    ended = [of("short", 0.0) for _ in range(2)]
    for ask in ended:
        one.arrived(ask, 0)
        ask.num_output_tokens = 3
        one.finished(ask, "stop")
    known.lengths = dict.fromkeys(known.lengths, 9.0)
    before = len(asked)
    one.begin_step()
    assert one.arrived(of("long", 0.0), 0).predicted == 9.0
    assert len(asked) > before
