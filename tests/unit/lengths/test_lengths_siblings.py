"""Samples of one prompt: what has finished refines the rest."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.lengths import LengthSettings, OnlineLengths
from vllm_suite.lengths.siblings import Group, Posterior, Siblings

CAP = 32_768


def classes(seed: int = 0, correlation: float = 0.76, **settings) -> OnlineLengths:
    """Log-normal lengths of one class, mean of logs 7 and deviation 1."""
    made = OnlineLengths(LengthSettings(sibling_correlation=correlation, half_life_observations=None, **settings))
    rng = random.Random(seed)
    for _ in range(2000):
        made.observe(["class:m"], max(1, round(math.exp(rng.gauss(7, 1)))))
    return made


def group_of(*lengths: int, censored: tuple[int, ...] = ()) -> Group:
    siblings = Siblings(4, 0.5)
    for tokens in lengths:
        siblings.add("g", tokens, False, None)
    for tokens in censored:
        siblings.add("g", tokens, True, None)
    found = siblings.get("g")
    assert found is not None
    return found


def lognormal_mean(mean: float, variance: float) -> float:
    return math.exp(mean + variance / 2)


def test_the_posterior_of_exact_siblings_is_the_textbook_one():
    """Class N(7, 1), correlation 0.75, two siblings of e^8: the prompt's effect is N(7 + 6/7, 3/28)."""
    found = Posterior(group_of(round(math.e**8), round(math.e**8)), (7.0, 1.0), 0.75)
    expected = lognormal_mean(7 + 6 / 7, 0.25 + 3 / 28)
    assert found.remaining(0, 10**7) == pytest.approx(expected, rel=1e-3)
    median = found.quantile(0.5, 0, 10**7)
    assert median == pytest.approx(math.exp(7 + 6 / 7), rel=2e-3)


def test_a_censored_sibling_says_more():
    short = Posterior(group_of(1000), (7.0, 1.0), 0.76).remaining(0, CAP)
    cut = Posterior(group_of(1000, censored=(4000,)), (7.0, 1.0), 0.76).remaining(0, CAP)
    running = Posterior(group_of(1000), (7.0, 1.0), 0.76, [4000]).remaining(0, CAP)
    assert cut > 1.5 * short
    assert running == pytest.approx(cut)


def test_far_past_all_siblings_the_answer_stays_finite_or_is_left_to_the_class():
    found = Posterior(group_of(*[10] * 200), (7.0, 1.0), 0.99, [4_000_000] * 50)
    rest = found.remaining(4_000_000, 4_000_100)
    assert rest is None or 0 <= rest <= 100


def test_short_siblings_shorten_and_long_ones_lengthen():
    made = classes()
    alone = made.remaining(["class:m"], 0, CAP)
    for tokens in (300, 350, 320):
        made.observe(["class:m"], tokens, group="short")
    for tokens in (6000, 7000):
        made.observe(["class:m"], tokens, group="long")
    assert made.remaining(["class:m"], 0, CAP, group="short") < 0.5 * alone
    assert made.remaining(["class:m"], 0, CAP, group="long") > 2 * alone
    assert made.remaining(["class:m"], 0, CAP, group="other") == pytest.approx(alone, rel=0.02)
    assert made.quantile(["class:m"], 0.5, 0, CAP, group="short") < made.quantile(["class:m"], 0.5, 0, CAP)
    made.forget("short")
    assert made.remaining(["class:m"], 0, CAP, group="short") == made.remaining(["class:m"], 0, CAP)


def test_groups_predict_better_than_the_class_where_samples_are_alike():
    """Prompts with correlation 0.76, 8 samples side by side; asked when 3 have ended, about each of the others.

    The three are the shortest: without the five that still run the answer is too short.
    """
    rng = random.Random(3)
    made = classes()
    errors = dict.fromkeys(("class", "group", "blind"), 0.0)
    sums = dict.fromkeys(("class", "group", "blind", "truth"), 0.0)
    for number in range(150):
        effect = rng.gauss(7, math.sqrt(0.76))
        lengths = sorted(min(max(1, round(math.exp(rng.gauss(effect, math.sqrt(0.24))))), CAP) for _ in range(8))
        name, age = f"g{number}", lengths[2]
        for tokens in lengths[:3]:
            made.observe(["class:m"], tokens, group=name)
        asked = {
            "class": made.remaining(["class:m"], age, CAP),
            "group": made.remaining(["class:m"], age, CAP, group=name, running=[age] * 4),
            "blind": made.remaining(["class:m"], age, CAP, group=name),
        }
        for tokens in lengths[3:]:
            sums["truth"] += tokens - age
            for way, rest in asked.items():
                errors[way] += (math.log(age + rest) - math.log(max(tokens, age + 1))) ** 2
                sums[way] += rest
            made.observe(["class:m"], tokens, group=name)
        made.forget(name)
    assert errors["group"] < 0.25 * errors["class"]
    assert sums["group"] == pytest.approx(sums["truth"], rel=0.2)
    assert sums["blind"] < 0.9 * sums["truth"]


@pytest.mark.parametrize("truth", [0.1, 0.9])
def test_the_correlation_is_learned(truth):
    made = classes(correlation=0.5)
    rng = random.Random(1)
    for number in range(400):
        effect = rng.gauss(7, math.sqrt(truth))
        for _ in range(4):
            tokens = max(1, round(math.exp(rng.gauss(effect, math.sqrt(1 - truth)))))
            made.observe(["class:m"], tokens, group=f"g{number}")
        made.forget(f"g{number}")
    assert made._siblings.correlation == pytest.approx(truth, abs=0.12)


def test_groups_that_were_cut_off_teach_nothing_of_the_correlation():
    """The first two of five are alike because they are both short."""
    made = classes(correlation=0.3)
    rng = random.Random(1)
    for number in range(200):
        lengths = sorted(max(1, round(math.exp(rng.gauss(7, 1)))) for _ in range(5))
        for tokens in lengths[:2]:
            made.observe(["class:m"], tokens, group=f"g{number}")
        made.observe(["class:m"], lengths[1], censored=True, group=f"g{number}")
        made.forget(f"g{number}")
    assert made._siblings.correlation == pytest.approx(0.3)


def test_groups_are_bounded():
    siblings = Siblings(3, 0.5)
    for number in range(10):
        siblings.add(f"g{number}", 5, number % 2 == 0, None)
        siblings.add("kept", 5, True, None)
    assert len(siblings) == 3
    found = siblings.get("kept")
    assert found is not None
    assert len(found.censored) <= 16


@given(
    st.lists(st.integers(0, 40_000), max_size=20),
    st.lists(st.integers(0, 40_000), max_size=20),
    st.lists(st.integers(0, 40_000), max_size=20),
    st.floats(0, 12),
    st.floats(0.01, 4),
    st.floats(0.01, 0.99),
    st.integers(0, 50_000),
    st.lists(st.integers(0, 60_000), min_size=2, max_size=3),
)
def test_a_posterior_never_leaves_the_bounds(exact, censored, running, mean, deviation, correlation, age, caps):
    if not exact and not censored:
        return
    found = Posterior(group_of(*exact, censored=tuple(censored)), (mean, deviation), correlation, running)
    caps = sorted(cap for cap in caps if cap > age)
    rests = [rest for cap in caps if (rest := found.remaining(age, cap)) is not None]
    for cap, rest in zip(caps, rests, strict=False):
        assert 0 <= rest <= cap - age
    assert rests == pytest.approx(sorted(rests), rel=1e-6, abs=1e-6)
    quantiles = [found.quantile(q, age, age + 1000) for q in (0.1, 0.5, 0.9)]
    assert None in quantiles or quantiles == sorted(quantiles)
