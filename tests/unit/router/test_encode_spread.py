"""Which encoder gets what, what it will cost, and who has to wait."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_suite.handoff import VERSION, Handoff
from vllm_suite.router.encode.config import Encode
from vllm_suite.router.encode.cost import Costs
from vllm_suite.router.encode.gate import Gate
from vllm_suite.router.encode.known import Encoded, Known
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.encode.spread import make_spread
from vllm_suite.router.members import Member, Pool, State
from vllm_suite.router.metrics import Rate

POLICIES = ["cache_affinity", "least_encode_tokens"]


def member(name, tokens=0, epoch="e1"):
    made = Member(f"http://{name}:1", State(name, epoch, "encode", True, ("tiny",)), "encode", 16)
    made.encode_tokens = tokens
    return made


def item(name, tokens=64):
    return Item(0, "image_url", "image", 0, 0, "", identity=str(name), tokens=tokens)


def spread(policy, **more):
    return make_spread(Encode(policy=policy, **more))


members = st.lists(st.integers(0, 5000), min_size=1, max_size=6).map(
    lambda loads: [member(f"e{number}", load) for number, load in enumerate(loads)]
)
items = st.lists(st.integers(1, 4000), max_size=30).map(
    lambda costs: [item(f"s-{number}", cost) for number, cost in enumerate(costs)]
)


@given(st.sampled_from(POLICIES), items, members)
def test_every_item_has_every_encoder_once_in_its_order(policy, found, encoders):
    orders = spread(policy).order(found, encoders)
    assert len(orders) == len(found)
    assert all(sorted(m.instance_id for m in order) == [m.instance_id for m in encoders] for order in orders)


@given(st.sampled_from(POLICIES), items, members)
def test_no_encoder_is_given_much_more_than_its_share(policy, found, encoders):
    loads = {one: one.encode_tokens for one in encoders}
    given_to = set()
    for one, order in zip(found, spread(policy).order(found, encoders), strict=True):
        loads[order[0]] += one.tokens
        given_to.add(order[0])
    mean = sum(loads.values()) / len(encoders)
    largest = max((one.tokens for one in found), default=0)
    # Who gets anything ends up at most one item above the bound.
    assert all(loads[one] <= 1.1 * mean + largest for one in given_to)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_equal_items_are_split_evenly_over_idle_encoders(policy, count):
    encoders = [member("e0"), member("e1")]
    orders = spread(policy).order([item(f"s-{number}") for number in range(count)], encoders)
    assert sorted(sum(order[0] is one for order in orders) for one in encoders) == [count // 2, count // 2]


def test_affinity_keeps_an_item_on_its_encoder():
    encoders = [member(f"e{number}") for number in range(4)]
    policy = spread("cache_affinity")
    for number in range(200):
        one = item(f"s-{number}")
        home = policy.order([one], encoders)[0][0]
        others = [m for m in encoders if m is not home]
        # Whoever else leaves, or has something to do, it stays.
        assert policy.order([one], [home, others[0]])[0][0] is home
        others[0].encode_tokens = 1000
        assert policy.order([one], encoders)[0][0] is home
        others[0].encode_tokens = 0
        # Where its own is busy it goes to the next in its order, the same for every router.
        home.encode_tokens = 1000
        assert policy.order([one], encoders)[0][0] is not home
        home.encode_tokens = 0


def test_affinity_spreads_contents():
    encoders = [member(f"e{number}") for number in range(4)]
    policy = spread("cache_affinity")
    homes = [policy.order([item(f"s-{number}")], encoders)[0][0] for number in range(2000)]
    assert min(homes.count(one) for one in encoders) > 400


def test_costs_follow_the_family():
    """Rows that grow with the area, and rows that do not."""
    draw = random.Random(3)
    for rows_of in (lambda pixels: pixels / 784, lambda pixels: 576, lambda pixels: 64 + pixels / 1000):
        costs = Costs()
        for _ in range(60):
            pixels = draw.randrange(10_000, 1_000_000)
            costs.learn("m", Item(0, "", "image", 0, 0, "", units=pixels, unit="pixels"), round(rows_of(pixels)))
        for pixels in (20_000, 300_000, 900_000):
            estimate = costs.estimate("m", Item(0, "", "image", 0, 0, "", units=pixels, unit="pixels"))
            assert estimate == pytest.approx(rows_of(pixels), rel=0.05, abs=2)
    other = costs.estimate("other", Item(0, "", "image", 0, 0, "", units=784_000, unit="pixels"))
    assert other == 1000


@given(
    st.lists(st.tuples(st.floats(0, 1e12), st.integers(-5, 1 << 40)), max_size=40),
    st.floats(0, 1e12),
    st.sampled_from(["pixels", "bytes"]),
)
@example([(5e-324, 1)], 0.0, "pixels")
@example([(5e-324, 1)], 1e12, "bytes")
def test_estimates_are_always_usable(learned, amount, unit):
    costs = Costs()
    for units, rows in learned:
        costs.learn("m", Item(0, "", "image", 0, 0, "", units=units, unit=unit), rows)
    assert 1 <= costs.estimate("m", Item(0, "", "image", 0, 0, "", units=amount, unit=unit)) <= 1 << 20


async def quiet():
    """Everything that can run has run: a gate needs no time, only turns of the loop."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_gate_lets_in_as_many_as_fit_in_the_order_of_arrival():
    gate = Gate(10)
    entered = []

    async def visit(name, tokens):
        await gate.enter(tokens, 5.0)
        entered.append(name)

    tasks = [asyncio.create_task(visit(name, tokens)) for name, tokens in [("a", 6), ("b", 6), ("c", 2), ("d", 50)]]
    await quiet()
    assert entered == ["a"]  # c would fit and does not overtake b
    gate.leave(6)
    await quiet()
    assert entered == ["a", "b", "c"]
    gate.leave(6)
    await quiet()
    assert entered == ["a", "b", "c"]
    gate.leave(2)
    await asyncio.wait_for(asyncio.gather(*tasks), 2)
    assert entered == ["a", "b", "c", "d"]  # larger than the gate: alone
    gate.leave(50)
    await gate.enter(10, 0.1)


async def test_who_gives_up_waiting_leaves_no_hole():
    gate = Gate(10)
    await gate.enter(10, 1.0)
    with pytest.raises(TimeoutError):
        await gate.enter(8, 0.02)
    leaving = asyncio.create_task(gate.enter(8, 5.0))
    behind = asyncio.create_task(gate.enter(3, 5.0))
    await quiet()
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    gate.leave(10)
    await asyncio.wait_for(behind, 2)
    await gate.enter(7, 0.1)


async def test_being_let_in_and_cancelled_at_once_gives_the_room_back():
    gate = Gate(10)
    await gate.enter(10, 1.0)
    unlucky = asyncio.create_task(gate.enter(10, 5.0))
    await quiet()
    gate.leave(10)
    unlucky.cancel()
    await asyncio.gather(unlucky, return_exceptions=True)
    await asyncio.wait_for(gate.enter(10, 1.0), 2)


def encoded(producer="e0", epoch="e1"):
    ref = Handoff(
        version=VERSION,
        producer=producer,
        epoch=epoch,
        request_id="item-1",
        content="c",
        model="m",
        layout="l",
        tokens=4,
        location="x",
        claim_host="127.0.0.1",
        claim_port=1,
        lease_s=30.0,
    )
    return Encoded("s-1", ref, {})


def test_what_is_known_is_bounded_and_of_living_members():
    pool = Pool()
    first = member("e0")
    pool.admit(first)
    known = Known(3, pool)
    for number in range(5):
        known.put(f"s-{number}", encoded())
        known.get("s-0")  # used again and again
    assert len(known) == 3
    assert known.get("s-0") is not None
    assert known.get("s-1") is None
    known.put("s-9", encoded("stranger"))
    assert known.get("s-9") is None
    pool.forget(first)
    pool.admit(member("e0", epoch="e2"))
    assert known.get("s-0") is None
    assert len(known) == 2


def test_a_rate_fades():
    now = [0.0]
    rate = Rate(10.0, lambda: now[0])
    for _ in range(1000):
        now[0] += 0.1
        rate.add(5)
    assert rate.per_second() == pytest.approx(50, rel=0.02)
    now[0] += 100
    assert rate.per_second() < 0.01
