"""DLER's arithmetic against numbers worked by hand, and against the formula that verl publishes."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dler.train.recipe import (
    Tier,
    batch_advantages,
    clipped_loss,
    group_advantages,
    group_centred,
    informative,
    squared_kl,
    tier_limits,
    truncation_reward,
    whiten,
)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_a_cut_answer_earns_nothing_or_its_share() -> None:
    ended = torch.tensor([True, False, True, False])
    assert truncation_reward(t(1, 1, 0, 0), ended).tolist() == [1, 0, 0, 0]
    assert truncation_reward(t(1, 1, 0, 0), ended, partial_credit=0.1).tolist() == [1, 0.1, 0, 0]


def test_batch_advantages_by_hand() -> None:
    # Groups 1 0 0 0 and 1 1 0 0: centred 3/4 -1/4 -1/4 -1/4 and 1/2 1/2 -1/2 -1/2; the mean is 0, the sum of
    # squares 12/16 + 1 = 7/4, the unbiased variance 1/4 and so the deviation 1/2: everything doubles.
    got = batch_advantages(t(1, 0, 0, 0, 1, 1, 0, 0), 4)
    assert got.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 1, 1, -1, -1], abs=1e-6)


def test_batch_advantages_weighted_by_tokens_by_hand() -> None:
    # Centred 1/2 -1/2; lengths 1 and 3: mean -1/4, squares (9/16 + 3/16) / 3 = 1/4: (3/4, -1/4) doubled.
    got = batch_advantages(t(1, 0), 2, torch.tensor([1, 3]))
    assert got.tolist() == pytest.approx([1.5, -0.5], abs=1e-6)
    assert batch_advantages(t(1, 0), 2).tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], abs=1e-6)


def test_group_advantages_by_hand() -> None:
    # 1 0 0 0: deviation sqrt((9/16 + 3/16) / 3) = 1/2. A group with one right answer in four is scaled on its own.
    assert group_advantages(t(1, 0, 0, 0, 1, 1, 1, 1), 4).tolist() == pytest.approx(
        [1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], abs=1e-5
    )


def test_a_batch_without_differences_gives_zeros() -> None:
    assert batch_advantages(t(1, 1, 0, 0), 2).tolist() == [0, 0, 0, 0]
    assert group_advantages(t(1, 1, 0, 0), 2).tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="one value cannot be whitened"):
        whiten(t(1))


def verl_advantages(reward: list[float], index: list[int], mask: list[list[int]]) -> list[list[float]]:
    """Advantages per token of ``reinforce_plus_plus_baseline`` as verl 0.9.1 documents it, in plain Python.

    The score of a response less the mean of its prompt's, spread over its tokens, whitened over all tokens of the
    batch with the unbiased variance and 1e-8 under the root.
    """
    of: dict[int, list[float]] = defaultdict(list)
    for score, prompt in zip(reward, index, strict=True):
        of[prompt].append(score)
    centred = [score - sum(of[p]) / len(of[p]) for score, p in zip(reward, index, strict=True)]
    tokens = [value for value, row in zip(centred, mask, strict=True) for bit in row if bit]
    mean = sum(tokens) / len(tokens)
    variance = sum((value - mean) ** 2 for value in tokens) / (len(tokens) - 1)
    scale = 1 / math.sqrt(variance + 1e-8)
    return [[(value - mean) * scale * bit for bit in row] for value, row in zip(centred, mask, strict=True)]


@given(
    rewards=st.lists(st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=4, max_size=4), min_size=2, max_size=6),
    seed=st.integers(0, 1000),
)
def test_token_weighted_advantages_are_verls(rewards: list[list[float]], seed: int) -> None:
    flat = [score for group in rewards for score in group]
    lengths = torch.randint(1, 12, (len(flat),), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(12) < lengths[:, None]).int()
    index = [i for i in range(len(rewards)) for _ in range(4)]
    ours = batch_advantages(t(*flat), 4, lengths)[:, None] * mask
    theirs = torch.tensor(verl_advantages(flat, index, mask.tolist()), dtype=torch.float64)
    assert torch.allclose(ours, theirs, atol=1e-6)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=24).filter(lambda v: len(v) % 4 == 0))
def test_response_weighted_advantages_are_equation_3(rewards: list[float]) -> None:
    centred = group_centred(t(*rewards), 4)
    deviation = centred.std()
    expected = (centred - centred.mean()) / deviation if deviation > 0 else centred * 0
    assert torch.allclose(batch_advantages(t(*rewards), 4), expected, atol=1e-6)


def test_informative_groups() -> None:
    reward = t(0, 0, 1, 1, 0, 1, 0.1, 0)
    assert informative(reward, 2).tolist() == [False, False, True, True]


def test_tiers_by_hand() -> None:
    # Right shares 1/4, 1/2, 3/4 and 1 of a group of 4.
    reward = t(1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1)
    one = tier_limits(reward, 4, [Tier(0.5, 2000)], 4000).view(-1, 4)[:, 0]
    assert one.tolist() == [4000, 2000, 2000, 2000]
    two = tier_limits(reward, 4, [Tier(0.9, 1000), Tier(0.5, 2000)], 4000).view(-1, 4)[:, 0]
    assert two.tolist() == [4000, 2000, 2000, 1000]
    assert tier_limits(reward, 4, [], 4000).tolist() == [4000] * 16


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [
        (1.25, 1.0, -1.25, True),  # within the wider upper clip: still pushed
        (1.40, 1.0, -1.28, False),  # beyond it
        (0.50, 1.0, -0.50, True),  # an unlikely good token is never clipped from below
        (0.50, -1.0, 0.80, False),  # a bad one is, at 1 - 0.2
        (1.40, -1.0, 1.40, True),
        (20.0, -1.0, 10.0, False),  # dual clip
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, loss: float, moves: bool) -> None:
    now = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    got = clipped_loss(now, torch.zeros(1, 1), t(advantage), torch.ones(1, 1))
    assert got.item() == pytest.approx(loss)
    got.backward()
    assert now.grad is not None
    assert (now.grad.item() != 0) == moves


def test_the_loss_is_a_mean_over_tokens() -> None:
    # Responses of 1 and 3 tokens, advantages 1 and -1, ratio 1: (-1 + 3) / 4.
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    zeros = torch.zeros(2, 3, dtype=torch.float64)
    assert clipped_loss(zeros, zeros, t(1, -1), mask).item() == 0.5


def test_squared_kl_by_hand() -> None:
    assert squared_kl(t(-1.0, -2.0), t(-1.5, -2.0)).tolist() == [0.125, 0]
