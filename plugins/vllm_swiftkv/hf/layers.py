"""A tail layer: transformers' own decoder layer that can also take its keys and values from elsewhere."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllm_swiftkv.families import SwiftKVError

KeyValue = tuple[Tensor, Tensor]
"""Keys (after RoPE) and values of one leader: [B, kv_heads, T, head_dim] each."""


@functools.cache
def tail_layer_class(layer_class: Any) -> Any:
    """``LlamaDecoderLayer`` and the like, with a student's way through it beside the ordinary one."""
    name = layer_class.__name__.replace("DecoderLayer", "SwiftKVDecoderLayer")
    return type(name, (_TailLayer, layer_class), {"__module__": __name__})


class _TailLayer:
    """Goes before a transformers decoder layer among the bases.

    Everything of the student happens inside ``forward``, projections of the shared input included: sharded training
    gathers a layer's weights when the layer is called, and at no other time.
    """

    def __init__(self, config: Any, layer_idx: int, *, leader: bool, bias: bool, teacher: bool) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self.teacher = teacher
        attention = self.self_attn  # type: ignore[attr-defined]
        for name in ("q", "k", "v") if leader else ("q",):
            ordinary = getattr(attention, f"{name}_proj")
            late = nn.Linear(ordinary.in_features, ordinary.out_features, bias=bias)
            setattr(attention, f"{name}_proj_swiftkv", late)
        if not teacher:
            del attention.q_proj, attention.k_proj, attention.v_proj
            if not leader and hasattr(attention, "k_norm"):
                del attention.k_norm

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        late_input: Tensor | None = None,
        late_kv: KeyValue | None = None,
        **kwargs: Any,
    ) -> Any:
        """The ordinary layer, or the student's where ``late_input`` or ``late_kv`` is given.

        Args:
            hidden_states: [B, T, D].
            late_input: for a leader, the normed output of the head, [B, T, D].
            late_kv: for the others of a group, what their leader returned.

        Returns:
            [B, T, D] of the ordinary layer; ([B, T, D], keys and values used) of the student's.
        """
        if late_input is None and late_kv is None:
            if not self.teacher:
                raise SwiftKVError("this checkpoint has no teacher weights: layers after the cut have no q, k and v")
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        return self._student(hidden_states, late_input, late_kv, **kwargs)

    def _student(
        self,
        x: Tensor,
        late_input: Tensor | None,
        late_kv: KeyValue | None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        position_ids: Tensor,
    ) -> tuple[Tensor, KeyValue]:
        attention: Any = self.self_attn  # type: ignore[attr-defined]
        own = importlib.import_module(type(attention).__module__)  # the family's modelling file

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, attention.head_dim))

        def rotated(y: Tensor) -> Tensor:
            y = y.transpose(1, 2)
            turned: Tensor = own.apply_rotary_pos_emb(y, y[:, :0], *position_embeddings)[0]
            return turned

        if late_kv is None:
            k = heads(attention.k_proj_swiftkv(late_input))
            k = attention.k_norm(k) if hasattr(attention, "k_norm") else k
            late_kv = rotated(k), heads(attention.v_proj_swiftkv(late_input)).transpose(1, 2)
        q = heads(attention.q_proj_swiftkv(self.input_layernorm(x)))  # type: ignore[attr-defined]
        q = rotated(attention.q_norm(q) if hasattr(attention, "q_norm") else q)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, own.eager_attention_forward
        )
        # Under autocast a norm with float32 weights widens what it normalises; attention wants one type.
        k, v = (t.to(q.dtype) for t in late_kv)
        out, _ = attend(
            attention, q, k, v, attention_mask, dropout=0.0, scaling=attention.scaling, position_ids=position_ids
        )
        x = x + attention.o_proj(out.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x)), late_kv  # type: ignore[attr-defined]


def start_from_teacher(layers: list[Any], cut: int, group: int) -> None:
    """Set the tail's student projections from its teacher's, as the converter does: q copied, K/V the group's mean.

    Args:
        layers: all decoder layers of the model, tail layers with teacher weights.
    """
    for start in range(cut, len(layers), group):
        members = [layer.self_attn for layer in layers[start : start + group]]
        for attention in members:
            _copy(attention.q_proj_swiftkv, [attention.q_proj])
        for name in ("k", "v"):
            _copy(getattr(members[0], f"{name}_proj_swiftkv"), [getattr(m, f"{name}_proj") for m in members])


def _copy(into: nn.Linear, sources: list[nn.Linear]) -> None:
    for name, parameter in into.named_parameters():
        mean = torch.stack([source.get_parameter(name).detach().float() for source in sources]).mean(0)
        parameter.detach().copy_(mean)
