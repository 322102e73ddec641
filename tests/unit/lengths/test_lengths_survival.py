"""Kaplan-Meier tables by hand-worked numbers, and against a plain estimator."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_suite.lengths.sketch import MAX_BINS, MAX_TOKENS, Sketch, bin_of, edges
from vllm_suite.lengths.survival import Survival


def sketch_of(*lengths: tuple[int, bool], growth: float = 1.0) -> Sketch:
    made = Sketch()
    for tokens, censored in lengths:
        made.add(tokens, censored, growth, 0.0)
    return made


def survival_of(*lengths: tuple[int, bool]) -> Survival:
    return Survival(*sketch_of(*lengths).entries())


def plain(lengths: list[tuple[int, bool]], at: float) -> float:
    """S(at) by the definition."""
    survival = 1.0
    for tokens in sorted({tokens for tokens, censored in lengths if not censored and tokens <= at}):
        reached = sum(1 for other, _ in lengths if other >= tokens)
        ended = sum(1 for other, censored in lengths if other == tokens and not censored)
        survival *= 1 - ended / reached
    return survival


def test_a_textbook_sample():
    """Remission of 21 patients under 6-MP (Freireich et al. 1963): the standard example of the estimator."""
    ended = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    cut = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    table = survival_of(*((weeks, False) for weeks in ended), *((weeks, True) for weeks in cut))
    published = {5: 1.0, 6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448, 35: 0.448}
    for weeks, share in published.items():
        assert table.beyond(weeks) == pytest.approx(share, abs=5e-4)
    assert table.past(16) == 8 + 2  # eight cut off and two ended later


def test_censored_lengths_by_hand():
    """10, 20 cut off, 30, 40: S is 1, 3/4 from 10, 3/8 from 30, 0 from 40."""
    table = survival_of((10, False), (20, True), (30, False), (40, False))
    assert [table.beyond(at) for at in (0, 9, 10, 20, 29, 30, 39, 40)] == [1, 1, 0.75, 0.75, 0.75, 0.375, 0.375, 0]
    assert table.restricted(40) == pytest.approx(10 + 20 * 0.75 + 10 * 0.375)
    assert table.restricted(25) == pytest.approx(10 + 15 * 0.75)
    assert [table.past(at) for at in (0, 10, 20, 39, 40)] == [4, 3, 2, 1, 0]


def test_what_ends_and_is_cut_off_at_once_is_cut_off_after():
    assert survival_of((10, True), (10, False)).beyond(10) == 0.5
    # In one bin, but 1020 was cut off before 1022 was reached.
    assert bin_of(1020) == bin_of(1022)
    assert survival_of((1020, True), (1022, False)).beyond(1022) == 0.0
    assert survival_of((1022, True), (1020, False)).beyond(1022) == 0.5


@given(st.integers(1, 5000), st.lists(st.booleans(), min_size=1, max_size=30), st.floats(1.0, 1.5))
def test_equal_lengths_stay_equal_whatever_the_rounding(tokens, censored, growth):
    made = sketch_of((tokens, False), (tokens, True), *((tokens, one) for one in censored), growth=growth)
    table = Survival(*made.entries())
    assert table.past(tokens) == 0.0
    assert table.beyond(tokens) > 0.0
    assert table.past(tokens - 1) > 0.0


def test_log_moments_with_a_survivor():
    """1, e^2 cut off: half of the mass is log 0, half is 2 and an exponential excess of mean 1/2."""
    first, second = Survival([1.0, math.e**2], [1.0, 0.0], [0.0, 1.0]).log_moments(0.5)
    assert first == pytest.approx((0 + 2.5) / 2)
    assert second == pytest.approx((4 + 2 * 2 * 0.5 + 2 * 0.25) / 2)


@given(st.lists(st.tuples(st.integers(0, 31), st.booleans()), min_size=1, max_size=60))
def test_as_the_definition_says(lengths):
    """Lengths below 32 have bins of their own, so the table is exact."""
    table = survival_of(*lengths)
    for at in range(34):
        assert table.beyond(at) == pytest.approx(plain(lengths, at), abs=1e-9)
        assert table.past(at) == pytest.approx(sum(1 for tokens, _ in lengths if tokens > at))
    areas = [sum(plain(lengths, step) for step in range(at)) for at in range(32)]
    assert [table.restricted(at) for at in range(32)] == pytest.approx(areas)


@given(st.integers(0, MAX_TOKENS))
def test_bins_cover_all_lengths_and_are_narrow(tokens):
    index = bin_of(tokens)
    low, high = edges(index)
    assert low <= tokens <= high
    assert 0 <= index < MAX_BINS
    assert high - low <= max(low / 16, 0)
    assert bin_of(low) == bin_of(high) == index
    if high < MAX_TOKENS:
        assert bin_of(high + 1) == index + 1


@given(st.lists(st.tuples(st.integers(0, 5000), st.booleans()), min_size=1, max_size=80), st.floats(1.0, 4.0))
def test_fading_halves_what_is_a_half_life_old(lengths, growth):
    faded = sketch_of(*lengths, growth=growth)
    weights = [growth ** -(len(lengths) - 1 - index) for index in range(len(lengths))]
    at, ended, cut = faded.entries()
    assert sum(ended) + sum(cut) == pytest.approx(sum(weights), rel=1e-6)
    mass = sum(tokens * (one + other) for tokens, one, other in zip(at, ended, cut, strict=True))
    expected = sum(weight * tokens for weight, (tokens, _) in zip(weights, lengths, strict=True))
    assert mass == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_weights_stay_finite_for_ever():
    made = Sketch()
    for index in range(3000):
        made.add(7 if index < 2900 else 9, False, 2.0, 0.0)
    assert made.bins.tolist() == [9]
    assert made.entries() == ([9.0], [pytest.approx(2.0)], [0.0])
    assert made.count == 3000
