"""One training pass: teacher and student from a single run of the head they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vllm_swiftkv.distill.loss import cross_entropies, distillation_loss, tile_tokens
from vllm_swiftkv.distill.rows import Batch
from vllm_swiftkv.families import SwiftKVError


class Student(nn.Module):
    """A SwiftKV model with everything frozen but what the student owns, and its losses.

    Loss and LM head are inside ``forward``: sharded training gathers the outermost weights for it alone.
    """

    def __init__(self, model: Any, temperature: float, memory_mib: int) -> None:
        """``model`` must have its teacher weights; raises SwiftKVError otherwise."""
        super().__init__()
        if not model.teacher:
            raise SwiftKVError(
                "the checkpoint has no teacher weights to learn from: give the ordinary checkpoint it was made of, "
                "or convert that with --keep-teacher"
            )
        model.requires_grad_(False)
        for parameter in model.student_parameters().values():
            parameter.data = parameter.data.float()  # small steps vanish in bfloat16
            parameter.requires_grad_(True)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0  # a teacher always says the same
        self.model = model
        self.temperature = temperature
        self.tile = tile_tokens(memory_mib, model.config.vocab_size)
        # Where a sharding policy looks for the layers to shard.
        self._no_split_modules = model._no_split_modules

    def forward(self, batch: Batch, measure: bool = False) -> dict[str, Tensor]:
        """Sums over the batch's tokens, float32 scalars.

        Args:
            measure: add the cross-entropies, which training does not need.

        Returns:
            ``kl``: T² KL over the tokens before one to learn; ``mse``: squared difference of the last layer's inputs,
            meaned over the hidden size, over all real tokens; with ``measure`` also ``student`` and ``teacher``, the
            cross-entropies over the tokens before one to learn.
        """
        with torch.no_grad():  # nothing in the head trains
            head = self.model.head(batch.ids, batch.positions)
            teacher = self.model.tail(head, swiftkv=False)
        student = self.model.tail(head, swiftkv=True)
        weight = self.model.lm_head.weight
        chosen = batch.learn.flatten().nonzero().squeeze(1)
        ours, theirs = (states.last.flatten(0, 1).index_select(0, chosen) for states in (student, teacher))
        out = {"kl": distillation_loss(ours, theirs, weight, self.temperature, self.tile)}
        difference = student.penultimate.float() - teacher.penultimate.float()
        out["mse"] = (difference.square().mean(-1) * batch.real).sum()
        if measure:
            labels = batch.labels.flatten().index_select(0, chosen)
            out["student"], out["teacher"] = cross_entropies(ours, theirs, labels, weight, self.tile)
        return out
