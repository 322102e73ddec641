"""The decoder: head, late keys and values, tail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vllm_suite.compat.models import (
    RMSNorm,
    VllmConfig,
    VocabParallelEmbedding,
    get_forward_context,
    set_model_tag,
    support_torch_compile,
)
from vllm_swiftkv.families import Family, Split
from vllm_swiftkv.models.attention import CacheOnlyLayer, TailAttention, TailCache, TailLayer, leave_lora_out
from vllm_swiftkv.models.backend import backends
from vllm_swiftkv.models.guards import check_layer
from vllm_swiftkv.models.late_kv import LateKV
from vllm_swiftkv.settings import SwiftKVSettings

LayerMaker = Callable[[VllmConfig, str], nn.Module]


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class Head(nn.Module):
    """First compiled region: embedding, the layers before the cut, late keys and values."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", body: SwiftKVModel) -> None:
        super().__init__()
        # In a tuple: the modules are registered once, under the names that checkpoints and LoRA use.
        self._body = (body,)

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Residual stream at the cut [tokens, hidden], and what `LateKV.write` takes."""
        body = self._body[0]
        hidden_states = body.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in body.head_layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        normed, stream = body.norm_swiftkv(hidden_states, residual)
        return stream, *body.late_kv(positions, normed)


@support_torch_compile(dynamic_arg_dims={"positions": 0, "hidden_states": 0})
class Tail(nn.Module):
    """Second compiled region: the layers after the cut and the final norm, on the surviving rows."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", body: SwiftKVModel) -> None:
        super().__init__()
        self._body = (body,)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows], [rows, hidden] -> [rows, hidden]."""
        body = self._body[0]
        residual = None
        for layer in body.tail_layers:
            hidden_states, residual = layer(positions, hidden_states, residual)
        hidden_states, _ = body.norm(hidden_states, residual)
        return hidden_states


class SwiftKVModel(nn.Module):
    """Decoder of a SwiftKV model.

    Args:
        make_layer: makes one of the family's ordinary decoder layers (for the head).
        make_mlp: makes the family's MLP (for the tail).
        armed: tail layers run on the rows that vLLM will sample from; else on every row.
        settings: of the plugin; with ``prefill_only`` there is no tail at all, only its keys and values.
    """

    def __init__(
        self,
        *,
        vllm_config: VllmConfig,
        prefix: str,
        family: Family,
        make_layer: LayerMaker,
        make_mlp: LayerMaker,
        armed: bool,
        settings: SwiftKVSettings,
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.split = split = Split.of(config)
        self.armed, self.prefill_only = armed, settings.prefill_only
        prefill_only = settings.prefill_only
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=self.quant_config, prefix=f"{prefix}.embed_tokens"
        )
        layers: dict[int, nn.Module] = {i: make_layer(vllm_config, f"{prefix}.layers.{i}") for i in range(split.cut)}
        like: Any = layers[0].self_attn
        for layer in layers.values():
            check_layer(layer.self_attn, family)
        caches: list[TailCache] = []
        for i in range(split.cut, split.layers):
            name, leads = f"{prefix}.layers.{i}", split.leader_of(i) == i
            if leads:
                caches.append(TailCache(vllm_config, like, f"{name}.self_attn", family.qk_norm))
            if not prefill_only:
                attention = TailAttention(vllm_config, family, like, caches[-1], leads, f"{name}.self_attn")
                mlp = make_mlp(vllm_config, f"{name}.mlp")
                layers[i] = TailLayer(attention, mlp, config.hidden_size, config.rms_norm_eps)
            elif leads:
                layers[i] = CacheOnlyLayer(caches[-1])
        # By name, since a prefill-only instance has no layer for a follower.
        self.layers = nn.ModuleDict({str(i): layer for i, layer in layers.items()})
        self.head_layers = tuple(layers[i] for i in range(split.cut))
        self.tail_layers = () if prefill_only else tuple(layers[i] for i in range(split.cut, split.layers))
        self.norm_swiftkv = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Quantization schemes are looked up under the first leader; see packed_modules_mapping of the model.
        late_prefix = f"{prefix}.layers.{split.cut}.self_attn.kv_proj_swiftkv"
        self.late_kv = LateKV(vllm_config, family, like, caches, late_prefix, settings.late_kv_kernel)
        if not prefill_only:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._unwrap = armed and vllm_config.lora_config is not None
        self._tail_name = caches[0].attn.layer_name
        if armed:
            pair = backends(like.attn.attn_backend, self._tail_name, prefill_only)
            for layer in self.head_layers:
                layer.self_attn.attn.attn_backend = pair.head
            for cache in caches:
                cache.attn.attn_backend = pair.tail
        with set_model_tag("swiftkv_head"):
            self.head = Head(vllm_config=vllm_config, prefix=f"{prefix}.head", body=self)
        if not prefill_only:
            with set_model_tag("swiftkv_tail"):
                self.tail = Tail(vllm_config=vllm_config, prefix=f"{prefix}.tail", body=self)
            # The tail's inputs keep their addresses, as captured piecewise graphs need it.
            tokens = vllm_config.scheduler_config.max_num_batched_tokens
            device = self.norm.weight.device
            dtype = vllm_config.model_config.dtype
            self.register_buffer("_positions", torch.zeros(tokens, dtype=torch.int64, device=device), False)
            self.register_buffer("_rows", torch.zeros(tokens, config.hidden_size, dtype=dtype, device=device), False)

    def forward(
        self, input_ids: torch.Tensor | None, positions: torch.Tensor, inputs_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states [tokens, hidden]; rows that skipped the tail are NaN, since nobody may read them."""
        stream, *late = self.head(input_ids, positions, inputs_embeds)
        self.late_kv.write(positions, *late)
        if self.prefill_only:
            return stream
        if self._unwrap:  # vLLM wraps after loading and before the first run
            self._unwrap = False
            for layer in self.tail_layers:
                leave_lora_out(layer)
        rows, count = self._surviving()
        if rows is None:
            total = positions.shape[0]
            self._positions[:total].copy_(positions)
            self._rows[:total].copy_(stream)
            return self.tail(self._positions[:total], self._rows[:total])
        padded = rows.shape[0]
        torch.index_select(positions, 0, rows, out=self._positions[:padded])
        torch.index_select(stream, 0, rows, out=self._rows[:padded])
        context = get_forward_context()
        whole = context.batch_descriptor
        if whole is not None:  # picks the captured piecewise graph of the tail
            context.batch_descriptor = dataclasses.replace(whole, num_tokens=padded)
        try:
            hidden_states = self.tail(self._positions[:padded], self._rows[:padded])
        finally:
            context.batch_descriptor = whole
        out = stream.new_full(stream.shape, float("nan"))
        out[rows[:count]] = hidden_states[:count]
        return out

    def _surviving(self) -> tuple[torch.Tensor | None, int]:
        """Rows of this step that the tail runs on, padded, and how many are real; None for every row."""
        if not self.armed:
            return None, 0
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a profiling run
            return None, 0
        mine = metadata[self._tail_name]
        rows = getattr(mine, "logits_indices_padded", None)
        return rows, getattr(mine, "num_logits_indices", None) or 0
