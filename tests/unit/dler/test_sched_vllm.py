"""The policy inside vLLM's real scheduler, sync and ahead: same decisions as stock where there is nothing to order by,
and every request served once whatever happens."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sched_vllm import SEQS, Engine

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

LABELS = st.sampled_from([None, "short", "long"])
STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 150), st.integers(1, 90), LABELS, st.integers(0, 2)),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("reset")),
)
WORK = st.lists(STEPS, min_size=4, max_size=40)
RUNS = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


def play(engine: Engine, work: list[tuple[Any, ...]], check: Any = lambda engine: None) -> Engine:
    count = 0
    for name, *arguments in work:
        if name == "add":
            prompt, length, label, priority = arguments
            engine.add(f"r{count}", prompt, length, label, priority)
            count += 1
        elif name == "step":
            for _ in range(arguments[0]):
                engine.step()
                check(engine)
        elif name == "abort":
            engine.abort(f"r{arguments[0]}")
        else:
            engine.reset()
        check(engine)
    engine.drain()
    assert set(engine.ends) == {f"r{n}" for n in range(count)}
    assert engine.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == (
        engine.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1
    )
    return engine


@RUNS
@given(
    WORK,
    st.booleans(),
    st.sampled_from(["fcfs", "priority"]),
    st.booleans(),
    st.sampled_from([{"rule": "kappa", "kappa": 0}, {"boost": {"strength": 0}}]),
)
def test_a_rule_of_0_is_stock_vllm_step_by_step(work: Any, ahead: bool, policy: str, caching: bool, suite: Any) -> None:
    options: dict[str, Any] = {"ahead": ahead, "policy": policy, "caching": caching}
    assert play(Engine(suite, **options), work).log == play(Engine(None, **options), work).log


@RUNS
@given(WORK, st.booleans(), st.sampled_from([{"rule": "kappa", "kappa": 0.5}, {}]))
def test_so_is_any_where_nothing_is_known_and_the_cache_is_large(work: Any, ahead: bool, suite: Any) -> None:
    """Nothing is observed: no answer counts as one that ended by itself."""
    ours = Engine(suite, blocks=2000, ahead=ahead)
    ours.scheduler.length_policy.lengths.observe = lambda *_, **__: None
    work = [step for step in work if step[0] != "reset"]
    assert play(ours, work).log == play(Engine(None, blocks=2000, ahead=ahead), work).log


def consistent(engine: Engine) -> None:
    """Every unfinished request is in one place, and remembered."""
    scheduler = engine.scheduler
    places = [*scheduler.running, *scheduler.waiting, *scheduler.kv_holding_waiting]
    names = [request.request_id for request in places]
    assert len(names) == len(set(names))
    assert set(names) == set(scheduler.requests)
    assert set(names) == set(scheduler.length_policy._states)
    assert len(scheduler.running) <= SEQS
    ranks = [scheduler.length_policy.tracked(request).rank for request in scheduler.waiting]
    assert len(ranks) == len(scheduler.waiting)


MANY = {
    "rule": "kappa",
    "kappa": 0.3,
    "relearn_every": 2,
    "headroom_tokens": 8,
    "victims": {"min_run": 4, "max_evictions": 2},
}
GATED = MANY | {"gate": {"enabled": True}, "adaptive": {"enabled": True, "maximum": 1.0, "period_s": 0.1}}
PLAIN = MANY | {"headroom_tokens": 0}
BOOST = MANY | {"rule": "boost"}


@RUNS
@given(
    WORK,
    st.booleans(),
    st.sampled_from([MANY, GATED, PLAIN, BOOST]),
    st.sampled_from(["fcfs", "priority"]),
    st.booleans(),
)
def test_every_request_is_served_once(work: Any, ahead: bool, suite: Any, policy: str, caching: bool) -> None:
    plugins = ("dler", "epd") if caching else ("dler",)
    engine = Engine(suite, ahead=ahead, policy=policy, caching=caching, plugins=plugins)
    for name, tokens in (("short", 5), ("long", 80)):
        for _ in range(50):
            engine.scheduler.length_policy.lengths.observe([f"class:{name}"], tokens)
    play(engine, work, consistent)
    policy_ = engine.scheduler.length_policy
    assert (len(policy_._states), len(policy_.waits), len(policy_.placement.groups)) == (0, 0, 0)
    rows = policy_.report()["counters"].get("evictions", [])
    assert "unforeseen" not in {labels[0] for labels, _ in rows}
    assert policy_.headroom == 0
    for name, end in engine.ends.items():
        assert end == "abort" or engine.tokens[name] >= engine._lengths[name]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("suite", [PLAIN, PLAIN | {"victims": {"max_evictions": 1}}])
def test_every_eviction_of_a_full_cache_is_foreseen(suite: Any, ahead: bool, policy: str) -> None:
    engine = Engine(suite, ahead=ahead, policy=policy)
    for n in range(16):
        engine.add(f"r{n}", 90 + 5 * n, 60 + 17 * n % 90, ("short", "long", None)[n % 3], n % 2)
        engine.step()
        consistent(engine)
    engine.drain()
    assert set(engine.ends.values()) == {"stop"}
    engine.scheduler.shutdown()
    evicted = dict(
        (labels[0], count) for labels, count in engine.scheduler.length_policy.report()["counters"]["evictions"]
    )
    assert set(evicted) == {"kv_full"}
    assert evicted["kv_full"] >= 3


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_victim_is_ours_whatever_vllms_policy(policy: str) -> None:
    """vLLM would send back the second one, which came later; it is nearly done."""
    engine = Engine(PLAIN | {"victims": {}}, policy=policy, blocks=17)
    ours = engine.scheduler.length_policy
    for name, tokens in (("long", 80), ("short", 40)):
        for _ in range(200):
            ours.lengths.observe([f"class:{name}"], tokens)
    gone = []
    evicted = ours.evicted
    ours.evicted = lambda request, reason: (gone.append(request.request_id), evicted(request, reason))
    engine.add("first", 100, 80, "long")
    engine.add("second", 100, 40, "short")
    engine.drain()
    assert gone == ["first"]


def test_headroom_spares_evictions() -> None:
    counts = []
    for tokens in (0, 64):
        engine = Engine(PLAIN | {"headroom_tokens": tokens, "headroom_share": 1.0})
        for n in range(16):
            engine.add(f"r{n}", 90 + 5 * n, 60 + 17 * n % 90)
        engine.drain()
        rows = engine.scheduler.length_policy.report()["counters"].get("evictions", [])
        counts.append(sum(count for _, count in rows))
    assert counts[1] < counts[0] / 2


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_peeked_is_popped_within_a_step(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at a request, decides, and takes the first one out: it has to be the same, whatever was learned."""
    engine = Engine(PLAIN, ahead=ahead)
    queue = type(engine.scheduler.waiting)
    seen: list[Any] = []
    peek, pop = queue.peek_request, queue.pop_request

    def peeked(self: Any) -> Any:
        seen.append(peek(self))
        return seen[-1]

    def popped(self: Any) -> Any:
        request = pop(self)
        assert not seen or seen[-1] is request
        seen.clear()
        return request

    monkeypatch.setattr(queue, "peek_request", peeked)
    monkeypatch.setattr(queue, "pop_request", popped)
    work: list[tuple[Any, ...]] = []
    for n in range(40):
        work += [("add", 20 + 7 * n % 90, 1 + 13 * n % 80, ("short", "long", None)[n % 3], 0), ("step", n % 5)]
    play(engine, work, consistent)


@pytest.mark.parametrize("ahead", [False, True])
def test_k_of_n_ends_the_others_where_they_are(ahead: bool) -> None:
    engine = Engine(MANY, ahead=ahead)
    for n in range(7):
        engine.add(f"{n}_parent-1", 20, 10 + 30 * n, dler_stop_after=2)
    engine.drain()
    ends = [engine.ends[f"{n}_parent-1"] for n in range(7)]
    assert ends[:2] == ["stop", "stop"]
    assert set(ends[2:]) == {"length"}
    assert engine.tokens["6_parent-1"] == 0
    assert engine.scheduler.length_policy.report()["counters"]["group_stops"] == [[[], 5.0]]


def test_both_mixins_over_both_bases() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_suite.compat.encode_only import EncodeOnlyScheduler
    from vllm_suite.compat.length_scheduler import LengthAwareScheduler
    from vllm_suite.compat.scheduler import compose

    for base in (Scheduler, AsyncScheduler):
        made = compose((LengthAwareScheduler, EncodeOnlyScheduler), base)
        assert made.__name__ == f"LengthAwareEncodeOnly{base.__name__}"
        order = made.__mro__
        assert order.index(LengthAwareScheduler) < order.index(EncodeOnlyScheduler) < order.index(Scheduler)
        assert issubclass(made, base)
        assert compose((), base) is base
