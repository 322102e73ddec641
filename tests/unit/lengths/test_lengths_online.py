"""The estimator by hand-worked numbers."""

from __future__ import annotations

import pytest

from vllm_suite.lengths import LengthSettings, OnlineLengths

PLAIN = LengthSettings(half_life_observations=None, min_observations=2)


def model(*lengths: int, key: str = "a") -> OnlineLengths:
    made = OnlineLengths(PLAIN)
    for tokens in lengths:
        made.observe([key], tokens)
    return made


def test_nothing_known_is_none():
    made = OnlineLengths(PLAIN)
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
