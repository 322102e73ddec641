"""The estimator: hand-worked numbers, back-off, bounds, and what holds for any history."""

from __future__ import annotations

import sys
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.lengths import LengthSettings, OnlineLengths
from vllm_suite.lengths.sketch import MAX_BINS, MAX_TOKENS, edges

PLAIN = LengthSettings(half_life_observations=None, min_observations=2, shrinkage=0)
KEYS = ["class:a", "class:b", "lora:x", "~", ""]

histories = st.lists(
    st.tuples(st.lists(st.sampled_from(KEYS), max_size=3), st.integers(0, 40_000), st.booleans()), max_size=60
)
settings = st.builds(
    LengthSettings,
    min_observations=st.integers(1, 4),
    half_life_observations=st.one_of(st.none(), st.floats(1, 1000)),
    half_life_s=st.one_of(st.none(), st.floats(0.5, 1000)),
    shrinkage=st.floats(0, 20),
    tail_index=st.floats(1.1, 5),
)
ages = st.integers(0, 50_000)


def model(*lengths: int, key: str = "a", settings: LengthSettings = PLAIN) -> OnlineLengths:
    made = OnlineLengths(settings)
    for tokens in lengths:
        made.observe([key], tokens)
    return made


def learned(history, settings=None) -> OnlineLengths:
    made = OnlineLengths(settings)
    for index, (keys, tokens, censored) in enumerate(history):
        made.observe(keys, tokens, censored=censored, now=float(index))
    return made


def test_nothing_known_is_none():
    made = OnlineLengths()
    assert made.remaining(["a"], 0, 100) is None
    assert made.quantile(["a"], 0.5, 0, 100) is None
    assert made.level(["a"]) is None


def test_mean_of_what_remains():
    made = model(10, 20, 30, 40)
    assert made.remaining(["a"], 0, 100) == pytest.approx(25)
    assert made.remaining(["a"], 20, 100) == pytest.approx(15)  # 30 and 40 are left
    assert made.remaining(["a"], 0, 25) == pytest.approx((10 + 20 + 25 + 25) / 4)
    assert made.remaining(["a"], 30, 30) == 0


def test_quantiles_of_what_remains():
    made = model(10, 20, 30, 40)
    assert [made.quantile(["a"], q, 0, 100) for q in (0.25, 0.5, 0.51, 0.9)] == [10, 20, 30, 40]
    assert made.quantile(["a"], 0.9, 20, 35) == 15


def test_censored_lengths_lengthen_the_answer():
    made = OnlineLengths(PLAIN)
    for tokens, censored in ((10, False), (20, True), (30, False), (40, False)):
        made.observe(["a"], tokens, censored=censored)
    assert made.remaining(["a"], 0, 100) == pytest.approx(28.75)
    assert made.remaining(["a"], 10, 100) == pytest.approx((28.75 - 10) / 0.75)
    assert made.remaining(["a"], 10, 35) == pytest.approx((20 * 0.75 + 5 * 0.375) / 0.75)


def test_past_the_largest_observation_the_next_key_goes_on_and_then_a_heavy_tail():
    """`a` saw 10 and 20 cut off: half survives 20. Of all, 10, 20+, 50 and 80: after 20, 50 or 80, half each."""
    made = model(10, 10)
    made.observe(["a"], 20, censored=True)
    made.observe(["a"], 20, censored=True)
    made.observe([], 50)
    made.observe([], 80)
    after_20 = (50 + 80) / 2 - 20
    assert made.remaining(["a"], 0, 100) == pytest.approx(10 + 10 * 0.5 + 0.5 * after_20)
    assert made.remaining(["a"], 20, 100) == pytest.approx(after_20)
    assert made.remaining(["a"], 60, 100) == pytest.approx(20)
    # Nothing has been longer than 80. The tail is Lomax's with index 2 and the mean of all from age 0:
    # 10, 20 for 2/3 and then 65 - 20 more for 2/3.
    mean = 10 + 10 * 2 / 3 + 45 * 2 / 3
    assert made.remaining(["a"], 80, 100) == pytest.approx((mean + 80) * (1 - (mean + 80) / (mean + 100)))


def test_a_class_whose_answers_all_reach_their_limit_is_long():
    made = OnlineLengths(PLAIN)
    for _ in range(20):
        made.observe(["long"], 4096, censored=True)
        made.observe(["short"], 50)
    assert made.level(["long"]) == 0
    assert made.remaining(["long"], 0, 4096) == pytest.approx(4096)
    assert made.remaining(["long"], 1000, 8192) > 3096
    assert made.quantile(["long"], 0.05, 0, 4096) == 4096


def test_few_observations_leave_the_say_to_the_next_key():
    made = OnlineLengths(PLAIN)
    for _ in range(20):
        made.observe(["class:b"], 100)
    made.observe(["class:a", "class:b"], 1000)
    assert made.level(["class:a", "class:b"]) == 1
    assert made.level(["class:none"]) == 1
    made.observe(["class:a", "class:b"], 1000)
    assert made.level(["class:a", "class:b"]) == 0
    assert made.remaining(["class:a", "class:b"], 0, 4000) == pytest.approx(1000)
    assert made.remaining(["class:none", "class:b"], 0, 4000) == pytest.approx((20 * 100 + 2 * 1000) / 22)


def test_shrinkage_weighs_a_key_by_what_it_has_seen_that_far():
    made = OnlineLengths(LengthSettings(half_life_observations=None, min_observations=1, shrinkage=3))
    for _ in range(1000):
        made.observe([], 100)
    made.observe(["a"], 500)
    # All: 1000 of 100 and one of 500, more than 64 times the doubt.
    everything = (1000 * 100 + 500) / 1001
    assert made.remaining(["a"], 0, 4000) == pytest.approx((1 * 500 + 3 * everything) / 4)


def test_what_is_long_ago_fades():
    made = OnlineLengths(LengthSettings(half_life_observations=None, half_life_s=10, min_observations=1, shrinkage=0))
    made.observe(["a"], 100, now=0.0)
    made.observe(["a"], 400, now=10.0)
    assert made.remaining(["a"], 0, 4000) == pytest.approx((0.5 * 100 + 400) / 1.5)


def test_a_key_that_was_not_seen_for_long_loses_its_say():
    made = OnlineLengths(LengthSettings(half_life_observations=None, half_life_s=10, min_observations=1, shrinkage=1))
    for _ in range(1000):
        made.observe([], 10, now=100.0)
    made.observe(["a"], 500, now=100.0)
    early = made.remaining(["a"], 0, 4000)
    for _ in range(1000):
        made.observe([], 10, now=200.0)
    assert made.remaining(["a"], 0, 4000) < 0.02 * early + 10 * 1.1


def test_bad_input_is_named():
    made = model(10, 20)
    with pytest.raises(ValueError, match="-1 tokens"):
        made.observe(["a"], -1)
    with pytest.raises(ValueError, match="nan"):
        made.observe(["a"], 1, now=float("nan"))
    with pytest.raises(ValueError, match="age of -3"):
        made.remaining(["a"], -3, 10)
    for q in (0.0, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            made.quantile(["a"], q, 0, 10)
    made.observe(["a"], 1 << 40)
    assert made.quantile(["a"], 0.99, 30, 1 << 41) == MAX_TOKENS - 30


@given(histories, settings, st.lists(st.sampled_from(KEYS), max_size=3), ages, st.lists(ages, min_size=2, max_size=4))
def test_answers_lie_between_nothing_and_the_cap_and_grow_with_it(history, chosen, keys, age, caps):
    made = learned(history, chosen)
    if not history:
        assert made.remaining(keys, age, 100) is None
        return
    caps.sort()
    rests = [made.remaining(keys, age, cap) for cap in caps]
    for cap, rest in zip(caps, rests, strict=True):
        assert 0 <= rest <= max(cap - age, 0) * (1 + 1e-9)
    for less, more in pairwise(rests):
        assert less <= more * (1 + 1e-9)
    if caps[-1] > age:
        assert rests[-1] > 0


@given(histories.filter(bool), settings, st.lists(st.sampled_from(KEYS), max_size=3), ages, ages)
def test_quantiles_grow_with_q_and_stay_below_the_cap(history, chosen, keys, age, cap):
    made = learned(history, chosen)
    found = [made.quantile(keys, q, age, cap) for q in (0.01, 0.25, 0.5, 0.9, 0.99)]
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] <= max(cap - age, 0)


@given(histories.filter(bool), settings, st.sampled_from(KEYS), ages, st.integers(1, 3000))
def test_the_mean_is_that_of_the_quantiles(history, chosen, key, age, width):
    """Both are read from one distribution: the mean is the sum of ``P(rest > n)``."""
    made = learned(history, chosen)
    rest = made.remaining([key], age, age + width)
    steps = 200
    middle = sum(made.quantile([key], (step + 0.5) / steps, age, age + width) for step in range(steps)) / steps
    # A quantile is a whole number, rounded up; the highest 1/400 may lie anywhere below the cap.
    assert rest == pytest.approx(middle, abs=1.0 + width / steps)


def test_keys_are_bounded_and_the_idle_ones_leave():
    made = OnlineLengths(LengthSettings(max_keys=10, min_observations=1))
    for index in range(100):
        made.observe(["kept", f"k{index}"], 5)
        assert len(made) <= 10
    assert made.level(["kept"]) == 0
    assert made.level(["k0"]) == 1
    # A question keeps a key as well.
    for index in range(100, 120):
        assert made.remaining(["k95"], 0, 10) is not None
        made.observe([f"k{index}"], 5)
    assert made.level(["k95"]) == 0


def test_memory_stays_within_the_bound_that_the_documentation_states():
    made = OnlineLengths(LengthSettings(max_keys=8, min_observations=1))
    lengths = [edges(index)[end] for index in range(MAX_BINS) for end in (0, 1)]
    for number in range(20):
        for place, tokens in enumerate(lengths):
            made.observe([f"k{number}" + "x" * 1000], tokens, censored=place % 2 == 0)
        made.remaining([f"k{number}" + "x" * 1000], 5, 100)
    assert len(made._keys) == 8
    assert all(len(key) < 40 for key in made._keys)
    for known in made._keys.values():
        sketch, table = known.sketch, known.survival()
        columns = [sketch.bins, sketch.exact, sketch.exact_sums, sketch.censored, sketch.censored_sums]
        columns += [table.at, table.after, table.area, table.weight]
        assert len(sketch.bins) == MAX_BINS
        assert sum(map(sys.getsizeof, columns)) < 40_000


def test_threads_observe_and_ask_at_once():
    made = OnlineLengths(LengthSettings(max_keys=4, half_life_observations=None))
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for index in range(800):
                key = f"k{(seed + index) % 6}"
                made.observe([key], (seed * 7919 + index * 31) % 5000, censored=index % 5 == 0, group=f"g{index % 9}")
                rest = made.remaining([key], index % 100, 6000, group=f"g{index % 9}")
                assert rest is not None
                assert 0 < rest <= 6000
                if index % 200 == 0:
                    made.merge(OnlineLengths.from_dict(model(5, 6).to_dict()))
                    made.to_dict()
        except BaseException as exc:  # noqa: BLE001 - a thread's failure is the test's
            faults.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(switch)
    assert not faults
    assert len(made) <= 4
    total = made.to_dict()["all"]
    assert sum(total["exact"]) + sum(total["censored"]) == pytest.approx(6 * 800 + 6 * 4 * 2)


def test_heard_are_the_keys_with_enough_observations() -> None:
    made = OnlineLengths(LengthSettings(min_observations=2))
    keys = ("a", "b", "x" * 200)
    made.observe(["b", "x" * 200], 5)
    assert made.heard(keys) == ()
    made.observe(["a", "b", "x" * 200], 5)
    assert made.heard(keys) == ("b", "x" * 200)


@given(
    st.lists(st.tuples(st.sampled_from(["observe", "merge", "restore"]), st.sampled_from("abcdef")), max_size=40),
    st.integers(1, 3),
)
def test_turns_grow_whenever_heard_changes(events: list[tuple[str, str]], least: int) -> None:
    settings = LengthSettings(min_observations=least, max_keys=3)
    made, other = OnlineLengths(settings), OnlineLengths(settings)
    for what, key in events:
        before, turns = made.heard("abcdef"), made.turns
        if what == "observe":
            made.observe([key], 7)
        elif what == "merge":
            other.observe([key], 7)
            made.merge(other)
        else:
            made._restore(other._state())
        assert made.turns > turns or made.heard("abcdef") == before
