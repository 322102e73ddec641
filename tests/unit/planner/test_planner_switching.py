"""Role switching of simulated fleets: EPD's published rule, and how a switch is carried out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fleets import Watch, plan, serve, setting
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan, Role
from vllm_suite.planner.simulator.switching import (
    GoodputPolicy,
    Stage,
    Switch,
    Switched,
    Switching,
    epd_rule,
)
from vllm_suite.planner.workload import Item, Request

ROLES: tuple[Role, ...] = ("encode", "prefill", "decode")


def stages(queues: Sequence[int], engines: Sequence[int]) -> list[Stage]:
    return [Stage(role, queue, 0, count) for role, queue, count in zip(ROLES, queues, engines, strict=True)]


@pytest.mark.parametrize(
    ("queues", "engines", "expected"),
    [
        # From whoever has most engines, to the longest queue.
        ((0, 0, 10), (5, 1, 2), ("encode", "decode")),
        ((10, 0, 0), (1, 2, 5), ("decode", "encode")),
        ((0, 10, 0), (2, 1, 3), ("decode", "prefill")),
        # Every queue at least half as long as the longest: nothing. One below it is enough.
        ((5, 5, 10), (5, 1, 2), None),
        ((4, 5, 10), (5, 1, 2), ("encode", "decode")),
        ((10, 10, 10), (5, 1, 2), None),
        ((0, 0, 0), (5, 1, 2), None),
        # Only a stage with a shorter queue gives an engine, and only of two or more.
        ((10, 0, 10), (5, 1, 2), None),
        ((10, 0, 10), (5, 2, 2), ("prefill", "encode")),
        ((0, 0, 10), (1, 1, 6), None),
        ((9, 0, 10), (3, 1, 2), ("encode", "decode")),
        # As many to spare in both: the first in the order of the stages.
        ((0, 0, 10), (3, 3, 2), ("encode", "decode")),
    ],
)
def test_the_published_rule(queues: Sequence[int], engines: Sequence[int], expected: tuple[Role, Role] | None) -> None:
    assert epd_rule(stages(queues, engines)) == (Switch(*expected) if expected else None)


def always(source: Role, target: Role) -> GoodputPolicy:
    return GoodputPolicy(lambda stages, now: Switch(source, target))


EPD = plan(encode={"count": 2}, prefill={"count": 2}, decode={"count": 2})


def test_an_idle_engine_switches_after_the_cost() -> None:
    switching = Switching(always("prefill", "decode"), every=5.0, cost=lambda source, target: 0.7)
    of = replace(setting(), encode_seconds=lambda pool, item: 1.0)
    served, run = serve(EPD, of, [Request(n, 4.0 * n, 8, 4) for n in range(10)], switching=switching)
    # The policy would go on; the floor of one engine ends it. Prefill runs from 4.0 to 6.0 on the other engine.
    assert run.switches == (Switched("prefill", "decode", 5.0, 5.0, 5.7),)
    assert len(run.pools["decode"].busy) == 3
    assert run.pools["decode"].present[2] == pytest.approx(run.end - 5.7)
    assert run.pools["prefill"].present == (run.end, 5.0) or run.pools["prefill"].present == (5.0, run.end)
    assert len(served) == 10


def test_a_busy_engine_drains_first() -> None:
    # The second decode engine answers a long request until after 100 s.
    of, two = setting(), plan(prefill={"count": 1}, decode={"count": 2})
    switching = Switching(always("decode", "prefill"), every=5.0)
    long = Request(0, 0.0, 8, 100)
    served, run = serve(two, of, [long, *(Request(n, 4.0 * n, 8, 2) for n in range(1, 40))], switching=switching)
    (made,) = run.switches
    assert made.decided == 5.0
    assert made.drained == served[0].last_token > 100
    assert made.ended == pytest.approx(made.drained + 0.7)
    # Whatever comes meanwhile is answered by the other one.
    assert run.pools["decode"].busy[1] == pytest.approx(served[0].last_token - served[0].transferred)


def test_prefill_drains_until_its_blocks_were_pulled() -> None:
    # Decode has one place, taken until 22.1 s; the prompt that the leaving engine keeps is pulled then.
    of = setting()
    tight = plan(prefill={"count": 2}, decode={"count": 1, "max_num_seqs": 1, "kv_blocks": 4})
    requests = [Request(0, 0.0, 8, 20), Request(1, 2.5, 8, 2), Request(2, 2.5, 8, 2)]
    served, run = serve(tight, of, requests, switching=Switching(always("prefill", "decode"), every=5.0))
    (made,) = run.switches
    assert made.drained == pytest.approx(max(one.transferred for one in served[1:]))
    assert made.drained > served[0].last_token


def test_an_encoder_gives_its_waiting_items_to_the_others() -> None:
    of = replace(setting(), encode_seconds=lambda pool, item: 4.0)
    requests = [Request(n, 0.0, 72, 1, items=(Item("picture", 64),)) for n in range(8)]
    switching = Switching(always("encode", "prefill"), every=5.0)
    served, run = serve(plan(encode={"count": 2}, prefill={}, decode={}), of, requests, switching=switching)
    (made,) = run.switches
    # Each has one item in work at 5 s and two that wait; the leaving one ends its own at 8 s, which is then fetched.
    assert 8.0 < made.drained < 8.1
    assert sorted(one.encoded for one in served) == [4.0, 4.0, 8.0, 8.0, 12.0, 16.0, 20.0, 24.0]


def test_a_new_encoder_takes_its_share_of_what_waits() -> None:
    of = replace(setting(), encode_seconds=lambda pool, item: 4.0)
    requests = [Request(n, 0.0, 72, 1, items=(Item("picture", 64),)) for n in range(6)]
    switching = Switching(always("decode", "encode"), every=5.0, cost=lambda source, target: 1.0)
    served, _ = serve(plan(encode={}, prefill={}, decode={"count": 2}), of, requests, switching=switching)
    # From 6 s on there are two: the new one takes an item at once, the old one its third at 8 s.
    assert sorted(one.encoded for one in served) == [4.0, 8.0, 10.0, 12.0, 14.0, 16.0]


def test_engines_of_different_sizes_stay_what_they_are() -> None:
    uneven = Plan((PoolPlan("prefill", 1, Parallel(tp=2), kv_blocks=9), PoolPlan("decode", 1, kv_blocks=9)))
    with pytest.raises(PlanError, match="engines of different sizes cannot change their roles"):
        serve(uneven, setting(), [], switching=Switching())


@given(st.integers(0, 1000), st.lists(st.sampled_from(ROLES), min_size=2, max_size=12), st.sampled_from([1.0, 7.0]))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost(seed: int, order: list[Role], every: float) -> None:
    draw, now, requests = random.Random(seed), 0.0, list[Request]()
    for number in range(40):
        now += draw.choice([0.0, 0.5, 3.0])
        items = (Item("picture", 16, content=draw.choice([None, 1, 2])),) * draw.randrange(3)
        requests.append(Request(number, now, 40 + draw.randrange(20), draw.randrange(1, 30), items=items))
    turns = iter([*order, *order, *order] * 20)

    def policy(stages: Sequence[Stage], now: float) -> Switch | None:
        for stage in stages:
            assert stage.queue >= 0
            assert stage.running >= 0
            assert stage.engines >= 1
        source, target = next(turns, None), next(turns, None)
        return Switch(source, target) if source and target else None

    watch = Watch()
    of = replace(setting(), encode_seconds=lambda pool, item: 1.5)
    small = plan(encode={"count": 2}, prefill={"count": 2, "kv_blocks": 12}, decode={"count": 2, "kv_blocks": 12})
    switching = Switching(policy, every=every)
    served, run = serve(small, of, requests, observer=watch, switching=switching)
    assert [one.number for one in served] == list(range(40))
    assert watch.empty()
    # Seven engines at no time: six, less one that is between two roles.
    for made in run.switches:
        assert made.decided <= made.drained
        assert made.ended == pytest.approx(made.drained + 0.7)
        assert made.source != made.target
    present = sum(sum(pool.present) for pool in run.pools.values())
    between = sum(min(made.ended, run.end) - min(made.drained, run.end) for made in run.switches)
    assert present == pytest.approx(6 * run.end - between)
