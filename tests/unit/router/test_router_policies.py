"""Properties of the policies and of the choice among members."""

from __future__ import annotations

from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.router.config import Policies
from vllm_suite.router.members import Member, Pool, PrefixHistory, State, pick
from vllm_suite.router.policies import POLICIES, Candidate, Demand, make_policy

NAMES = sorted(POLICIES)
SETTINGS = Policies(seed=7, load_factor=1.25)


def member(name, *, role="decode", ready=True, models=("tiny",), load=0):
    state = State(name, "e1", "any", ready, tuple(models))
    made = Member(f"http://{name}:1", state, role, 16)
    for _ in range(load):
        made.charge(10)
    return made


def candidate(made: Member) -> Candidate:
    return made.candidate()


members = st.lists(
    st.builds(
        member,
        name=st.integers(0, 10_000).map(lambda number: f"i{number:05}"),
        role=st.sampled_from(["prefill", "decode", "any", "encode"]),
        ready=st.booleans(),
        load=st.integers(0, 20),
    ),
    max_size=8,
    unique_by=lambda made: made.instance_id,
)
demands = st.builds(Demand, st.integers(0, 100_000), st.one_of(st.none(), st.integers(0, 2**64 - 1)))


def pool_of(found):
    pool = Pool()
    for made in found:
        pool.admit(made)
    return pool


@given(members, st.data(), demands, st.sampled_from(NAMES))
def test_never_an_unready_excluded_or_foreign_member(found, data, demand, name):
    pool = pool_of(found)
    excluded = set(data.draw(st.lists(st.sampled_from(found), unique=True))) if found else set()
    for made in found:
        made.suspect = data.draw(st.booleans())
    allowed = [m for m in found if m.ready and m not in excluded and m.role in ("decode", "any")]
    chosen = pick(pool.eligible(("decode", "any"), None, excluded), make_policy(name, SETTINGS), demand)
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert chosen in allowed
        assert not chosen.suspect


@given(members.filter(bool), demands)
def test_least_tokens_picks_a_minimum(found, demand):
    candidates = tuple(map(candidate, sorted(found, key=lambda made: made.instance_id)))
    policy = make_policy("least_tokens", SETTINGS)
    for _ in range(3):
        chosen = candidates[policy.choose(candidates, demand)]
        assert chosen.outstanding_tokens == min(one.outstanding_tokens for one in candidates)


def test_least_tokens_spreads_equal_ones():
    candidates = tuple(candidate(member(f"i{number}")) for number in range(4))
    policy = make_policy("least_tokens", SETTINGS)
    counts = Counter(policy.choose(candidates, Demand(1, None)) for _ in range(40))
    assert set(counts.values()) == {10}


@given(st.integers(2, 8), st.integers(1, 5))
def test_round_robin_visits_all_before_one_twice(count, rounds):
    candidates = tuple(candidate(member(f"i{number}")) for number in range(count))
    policy = make_policy("round_robin", SETTINGS)
    picks = [policy.choose(candidates, Demand(1, None)) for _ in range(count * rounds)]
    for start in range(0, len(picks), count):
        assert sorted(picks[start : start + count]) == list(range(count))


def test_round_robin_goes_on_in_order_when_a_member_leaves():
    candidates = tuple(candidate(member(f"i{number}")) for number in range(4))
    policy = make_policy("round_robin", SETTINGS)
    assert [policy.choose(candidates, Demand(1, None)) for _ in range(2)] == [0, 1]
    left = candidates[:1] + candidates[2:]
    assert left[policy.choose(left, Demand(1, None))].instance_id == "i2"


@given(members.filter(lambda found: len(found) > 1), st.integers(0, 2**32))
def test_power_of_two_never_takes_the_most_loaded_alone(found, seed):
    candidates = tuple(map(candidate, found))
    most = max(one.outstanding_tokens for one in candidates)
    heaviest = [one for one in candidates if one.outstanding_tokens == most]
    policy = make_policy("power_of_two", Policies(seed=seed))
    chosen = [candidates[policy.choose(candidates, Demand(1, None))] for _ in range(20)]
    if len(heaviest) == 1:
        assert heaviest[0] not in chosen


def test_power_of_two_repeats_with_its_seed():
    candidates = tuple(candidate(member(f"i{number}")) for number in range(6))
    runs = [
        [policy.choose(candidates, Demand(1, None)) for _ in range(30)]
        for policy in (make_policy("power_of_two", Policies(seed=3)) for _ in range(2))
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 6


@given(members.filter(lambda found: len(found) > 1), st.integers(0, 2**64 - 1), st.data())
def test_prefix_hash_keeps_its_instance_when_another_leaves(found, prefix, data):
    idle = [candidate(made)._replace(outstanding_requests=0) for made in found]
    policy = make_policy("prefix_hash", SETTINGS)
    home = idle[policy.choose(idle, Demand(1, prefix))]
    gone = data.draw(st.sampled_from([one for one in idle if one is not home]))
    left = [one for one in idle if one is not gone]
    assert left[policy.choose(left, Demand(1, prefix))] == home


@given(members.filter(bool), st.integers(0, 2**64 - 1))
def test_prefix_hash_stays_within_its_bound(found, prefix):
    candidates = tuple(map(candidate, found))
    chosen = candidates[make_policy("prefix_hash", SETTINGS).choose(candidates, Demand(1, prefix))]
    total = sum(one.outstanding_requests for one in candidates) + 1
    assert chosen.outstanding_requests + 1 <= ceil(1.25 * total / len(candidates))


def test_prefix_hash_spreads_prefixes():
    candidates = tuple(candidate(member(f"i{number}")) for number in range(4))
    policy = make_policy("prefix_hash", SETTINGS)
    counts = Counter(policy.choose(candidates, Demand(1, prefix)) for prefix in range(4000))
    assert min(counts.values()) > 850


def test_every_name_of_the_settings_is_registered():
    annotation = Policies.model_fields["decode"].annotation
    assert set(annotation.__args__) == set(POLICIES)
    with pytest.raises(KeyError):
        make_policy("nearest", SETTINGS)


def test_a_model_is_looked_for_first_and_unknown_ones_go_anywhere():
    one, two = member("i1", models=("a",)), member("i2", models=("b", "c"))
    pool = pool_of([one, two])
    assert pool.eligible(("decode",), "c") == [two]
    assert pool.eligible(("decode",), "unknown") == [one, two]


@given(st.lists(st.lists(st.integers(0, 50), max_size=12), max_size=20), st.integers(0, 30))
def test_history_keeps_to_its_limit_and_matches_what_it_holds(prompts, limit):
    history = PrefixHistory(limit)
    for prompt in prompts:
        history.add(prompt)
        assert len(history) <= limit
        assert history.matched(prompt) in (len(prompt), *range(limit + 1))
    if prompts and len(set(prompts[-1])) <= limit:
        assert history.matched(prompts[-1]) == len(prompts[-1])
