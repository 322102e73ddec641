"""Dynamic sampling: which groups a step takes from which rounds; and the order of the prompts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_dler.train.grading import TrainError
from vllm_dler.train.rollouts import choose
from vllm_dler.train.rows import Stream

WRONG, RIGHT, MIXED = (0.0, 0.0), (1.0, 1.0), (1.0, 0.0)


def rounds(*given: list[tuple[float, float]]) -> Callable[[], torch.Tensor]:
    left = iter(given)
    return lambda: torch.tensor(next(left), dtype=torch.float64).flatten()


def test_rounds_go_on_until_the_step_is_full_and_the_surplus_is_cut() -> None:
    sample = rounds([WRONG, MIXED, RIGHT], [MIXED, WRONG, RIGHT], [MIXED, MIXED, MIXED], [MIXED] * 3)
    got = choose(sample, 2, 3, dynamic=True, max_rounds=5)
    assert got.groups == [1, 3, 6]
    assert (got.rounds, got.sampled, got.informative, got.surplus, got.filled) == (3, 9, 5, 2, 0)
    assert (got.all_right, got.all_wrong) == (2, 2)


def test_a_step_that_stays_short_is_filled_and_says_so() -> None:
    got = choose(rounds([WRONG, MIXED], [RIGHT, WRONG]), 2, 3, dynamic=True, max_rounds=2)
    assert got.groups == [1, 0, 2]
    assert (got.rounds, got.filled, got.surplus) == (2, 2, 0)


def test_or_stops_the_run_where_that_is_wanted() -> None:
    with pytest.raises(TrainError, match=r"2 rounds gave 1 of 3 groups .* \(1 all right, 2 all wrong\)"):
        choose(rounds([WRONG, MIXED], [RIGHT, WRONG]), 2, 3, dynamic=True, max_rounds=2, stop_short=True)


def test_without_it_a_step_is_one_round_as_it_came() -> None:
    got = choose(rounds([WRONG, MIXED, RIGHT]), 2, 3, dynamic=False, max_rounds=5)
    assert got.groups == [0, 1, 2]
    assert (got.rounds, got.informative, got.filled, got.surplus) == (1, 1, 0, 0)


def test_a_reward_below_one_for_cut_answers_counts_as_right_not_as_wrong() -> None:
    got = choose(rounds([(0.1, 0.1), WRONG]), 2, 1, dynamic=True, max_rounds=1)
    assert (got.all_right, got.all_wrong) == (1, 1)


def test_the_order_of_prompts_is_a_new_one_each_pass_and_goes_on_anywhere() -> None:
    whole = Stream(5, seed=3).take(15)
    assert [sorted(whole[i : i + 5]) for i in (0, 5, 10)] == [[0, 1, 2, 3, 4]] * 3
    assert whole[:5] != whole[5:10] or whole[5:10] != whole[10:]
    begun = Stream(5, seed=3)
    begun.take(7)
    assert Stream(5, seed=3, position=begun.position).take(8) == whole[7:]
    assert Stream(5, seed=4).take(15) != whole
