"""The arithmetic of DLER: truncated rewards, advantages over a batch, which groups teach, the clipped loss.

Pure functions on tensors. Responses come in groups: the ``group`` answers to one prompt lie side by side, so [N] with
N = prompts * group. Section numbers are those of arXiv 2510.15110.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_VARIANCE_FLOOR = 1e-8  # added to the variance of a batch, as verl's whitening does
_GROUP_STD_FLOOR = 1e-6  # added to the standard deviation of a group, as GRPO in verl does


@dataclass(frozen=True)
class Tier:
    """One tier of difficulty: groups with at least ``accuracy`` right answers may take ``max_tokens`` tokens."""

    accuracy: float
    max_tokens: int


def truncation_reward(reward: Tensor, ended: Tensor, *, partial_credit: float = 0.0) -> Tensor:
    """The reward of answers that ended within the limit; the others keep ``partial_credit`` of theirs.

    Args:
        reward: [N], what the grader gave.
        ended: [N] bool, whether the answer came to its end before it was cut.
        partial_credit: 0 in the paper; the published scripts keep 0.1.
    """
    return torch.where(ended, reward, reward * partial_credit)


def tier_limits(reward: Tensor, group: int, tiers: Sequence[Tier], max_tokens: int) -> Tensor:
    """[N] tokens that each answer may take: DA-DLER gives easy prompts, those often answered right, fewer.

    The share of right answers c is counted over ``reward`` > 0 as it is under the common limit, before a tier
    tightens it; a group gets the tier with the highest ``accuracy`` <= c, and ``max_tokens`` where it reaches none.
    The paper states neither; it has one tier, 2000 tokens above 0.5.
    """
    right = (reward > 0).view(-1, group).double().mean(1)
    limits = torch.full_like(right, max_tokens, dtype=torch.long)
    for tier in sorted(tiers, key=lambda tier: tier.accuracy):
        limits = torch.where(right >= tier.accuracy, tier.max_tokens, limits)
    return limits.repeat_interleave(group)


def group_centred(reward: Tensor, group: int) -> Tensor:
    """[N] reward less the mean of its group."""
    grouped = reward.view(-1, group)
    return (grouped - grouped.mean(1, keepdim=True)).flatten()


def whiten(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """[N] values with mean 0 and variance 1 over the batch; all zero where they do not differ.

    Args:
        weights: [N], how often each value counts. With the lengths of the responses this is whitening over tokens, as
            in verl; without, over responses, as in the paper's equation 3. The variance is the unbiased one.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    total = weights.sum()
    if total <= 1:
        raise ValueError("a batch of one value cannot be whitened: raise the number of prompts or the group size")
    centred = values - (values * weights).sum() / total
    variance = (centred.square() * weights).sum() / (total - 1)
    return centred * torch.rsqrt(variance + _VARIANCE_FLOOR)


def batch_advantages(reward: Tensor, group: int, lengths: Tensor | None = None) -> Tensor:
    """[N] advantages of equations 2 and 3: centred per group, then whitened over the whole batch.

    Args:
        lengths: [N] tokens of each response, to weigh it by them when whitening (the published scripts); None weighs
            all responses alike (the paper's equation, the default of this suite).
    """
    return whiten(group_centred(reward, group), lengths)


def group_advantages(reward: Tensor, group: int) -> Tensor:
    """[N] advantages of GRPO, centred and scaled per group: what DLER replaces, here to compare with."""
    centred = group_centred(reward, group).view(-1, group)
    deviation = reward.view(-1, group).std(1, keepdim=True)
    return (centred / (deviation + _GROUP_STD_FLOOR)).flatten()


def informative(reward: Tensor, group: int) -> Tensor:
    """[N / group] bool: the group's rewards differ, so that its advantages are not all zero.

    Dynamic sampling keeps these. With rewards of 0 and 1 it drops groups that are all wrong or all right.
    """
    grouped = reward.view(-1, group)
    return grouped.amax(1) > grouped.amin(1)


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = 0.2,
    high: float = 0.28,
    dual: float | None = 10.0,
) -> Tensor:
    """The policy loss as the mean over all tokens, with a wider clip upwards than downwards.

    TRL computes it in training (``loss_type="dapo"``, ``epsilon``, ``epsilon_high``, ``delta``); a test holds the two
    together.

    Args:
        logprobs, old_logprobs: [N, T] of the sampled tokens under the policy now and when they were sampled.
        advantages: [N], or [N, T] where they differ by token.
        mask: [N, T], 1 where a token is part of the response.
        low, high: the probability ratio is clipped to 1 - low .. 1 + high.
        dual: bound on the ratio where the advantage is negative (dual clip); None for no bound.
    """
    if advantages.dim() == 1:
        advantages = advantages.unsqueeze(1)
    ratio = (logprobs - old_logprobs).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual), loss)
    return (loss * mask).sum() / mask.sum().clamp(min=1)


def squared_kl(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Half the squared difference of log-probabilities per token: the KL estimate that the paper calls mse (k2)."""
    return 0.5 * (logprobs - reference).square()
