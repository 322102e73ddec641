"""The distillation loss on the vocabulary, in tiles: logits of all tokens never exist at once.

The LM head is frozen, so the gradient of a tile's loss with respect to its hidden states can be formed as soon as its
logits are there. Each logit is computed once, in the forward pass, and the backward pass only scales what was kept:
[N, D], no larger than the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BUFFERS = 6  # [tile, V] float32 tensors alive at one time, at most


def tile_tokens(memory_mib: int, vocab_size: int) -> int:
    """Tokens per tile so that a tile's logits and what is made of them take at most ``memory_mib``."""
    return max(1, (memory_mib << 20) // (4 * vocab_size * BUFFERS))


def distillation_loss(student: Tensor, teacher: Tensor, head: Tensor, temperature: float, tile: int) -> Tensor:
    """``T² · KL(teacher ‖ student)`` of the next-token distributions at temperature ``T``, summed over tokens.

    Args:
        student, teacher: [N, D], what the LM head takes; the gradient goes to ``student``.
        head: [V, D], weight of the frozen LM head. Raises ValueError for one that trains.
        tile: tokens per tile.
    """
    if head.requires_grad:
        raise ValueError("the LM head must be frozen: its gradient is not computed")
    loss: Tensor = _TiledKL.apply(student, teacher, head, temperature, tile)
    return loss


class _TiledKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, temperature: float, tile: int) -> Tensor:
        gradient = torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        for start in range(0, len(student), tile):
            here = slice(start, start + tile)
            p = _log_softmax(teacher[here], head, temperature)
            q = _log_softmax(student[here], head, temperature)
            difference = p - q
            p.exp_()
            total += difference.mul_(p).sum() * temperature**2
            # d(T² KL)/d(logits) = T (q - p): one T comes from the logits' own division.
            slope = q.exp_().sub_(p).mul_(temperature)
            gradient[here] = slope.to(head.dtype) @ head
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


def cross_entropies(student: Tensor, teacher: Tensor, labels: Tensor, head: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Sums over tokens of the negative log-likelihoods of ``labels`` [N], of student and teacher; no gradient."""
    sums = [head.new_zeros((), dtype=torch.float32) for _ in range(2)]
    with torch.no_grad():
        for start in range(0, len(labels), tile):
            here = slice(start, start + tile)
            for total, hidden in zip(sums, (student, teacher), strict=True):
                total -= _log_softmax(hidden[here], head, 1.0).gather(1, labels[here, None]).sum()
    return sums[0], sums[1]


def _log_softmax(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    # The product in the head's own type, everything after it in float32.
    logits = (hidden.to(head.dtype) @ head.t()).float().div_(temperature)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
