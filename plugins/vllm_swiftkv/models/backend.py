"""The attention backends of an armed model: vLLM's own, with metadata of the tail told of the rows that are left.

vLLM's fast-prefill machinery (``--kv-sharing-fast-prefill``) gives each step the rows that will be sampled and wraps
the backend of layers that share another layer's KV cache, so that its metadata describes those rows. Tail layers own
their caches, so they carry a backend of their own that does the same. vLLM's wrapper makes a class anew in every step;
this one does not. In a step that leaves no row out, as decode steps do, the tail takes the head's metadata as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_suite.compat.models import (
    AttentionBackend,
    CommonAttentionMetadata,
    make_kv_sharing_fast_prefill_common_attn_metadata,
    subclass_attention_backend,
)
from vllm_swiftkv.counters import COUNTERS

_PREFIX = "SwiftKV"


@dataclass(frozen=True)
class Backends:
    """Backend classes of the layers before and after the cut."""

    head: Any
    tail: Any


@functools.cache
def backends(base: type[AttentionBackend], counting_layer: str, prefill_only: bool = False) -> Backends:
    """``base`` for the head, and for the tail with metadata of the surviving rows only.

    One class each per model, so that vLLM puts the layers into two attention groups and builds metadata twice a step
    at most. ``counting_layer`` names the layer whose group counts the step; with ``prefill_only`` no row survives.
    """
    # The head's latest step and its metadata, until the tail has seen them. vLLM gives both groups of a step one
    # object; where it does not, or builds the tail's first, the tail builds its own.
    latest: list[tuple[CommonAttentionMetadata, Any]] = []

    class HeadMetadataBuilder(base.get_builder_cls()):  # type: ignore[misc]
        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
            latest[:] = [(common_attn_metadata, metadata)]
            return metadata

    class TailMetadataBuilder(base.get_builder_cls()):  # type: ignore[misc]
        def build(
            self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
        ) -> Any:
            """Metadata of the tail, with the rows it describes as ``logits_indices_padded``."""
            whole = common_attn_metadata
            rows = surviving_rows(whole)
            if counting_layer in self.layer_names:
                # From the host's offsets: num_actual_tokens may include a graph's padding.
                tokens = int(whole.query_start_loc_cpu.numpy()[-1])
                tail = 0 if prefill_only else tokens if rows is whole else rows.num_actual_tokens
                COUNTERS.step(tokens, prompt_tokens(whole), tail)
            of_head = latest.pop() if latest else None
            if rows is whole:
                if of_head is not None and of_head[0] is whole:
                    return of_head[1]
                return super().build(common_prefix_len, whole, fast_build)
            metadata: Any = super().build(common_prefix_len, rows, fast_build)
            metadata.logits_indices_padded = whole.logits_indices_padded
            metadata.num_logits_indices = whole.num_logits_indices
            return metadata

    return Backends(
        head=subclass_attention_backend(f"{_PREFIX}Head", base, HeadMetadataBuilder),
        tail=subclass_attention_backend(f"{_PREFIX}Tail", base, TailMetadataBuilder),
    )


def surviving_rows(whole: CommonAttentionMetadata) -> CommonAttentionMetadata:
    """The step as the tail sees it; ``whole`` itself where every row survives or the skip is not armed.

    The result carries no ``logits_indices_padded``: the wrapper that vLLM puts around the last followers of AcrossKV
    leaves it as it is.
    """
    if whole.max_query_len == 1 or whole.logits_indices_padded is None or whole.num_logits_indices is None:
        return whole
    if whole.max_logits_per_req != 1 or whole.num_logits_indices != whole.num_reqs:
        return make_kv_sharing_fast_prefill_common_attn_metadata(whole)
    # One row per request: its offsets are known on the host. vLLM's general way copies them from the device,
    # which waits for it in every mixed step.
    offsets, offsets_cpu = _arange(whole.num_reqs + 1, whole.query_start_loc)
    return CommonAttentionMetadata(
        query_start_loc=offsets,
        query_start_loc_cpu=offsets_cpu,
        seq_lens=whole.seq_lens,
        num_reqs=whole.num_reqs,
        num_actual_tokens=whole.num_reqs,
        max_query_len=1,
        max_seq_len=whole.max_seq_len,
        block_table_tensor=whole.block_table_tensor,
        slot_mapping=whole.slot_mapping,
        causal=True,
        seq_lens_cpu_upper_bound=whole.seq_lens_cpu_upper_bound,
    )


def prompt_tokens(whole: CommonAttentionMetadata) -> int:
    """Tokens of requests that are still in their prompt. Host memory only; 0 where vLLM does not say."""
    prefilling = whole.is_prefilling
    if prefilling is None or prefilling.device.type != "cpu":
        return 0
    # Through numpy: this runs in every step, and a torch operator costs the host several microseconds.
    flags = prefilling.numpy()
    if not flags.any():
        return 0
    lengths = np.diff(whole.query_start_loc_cpu.numpy())
    return int((lengths * flags[: lengths.size]).sum())


_offsets: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}


def _arange(size: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    key = (like.device, like.dtype)
    made = _offsets.get(key)
    if made is None or made[0].numel() < size:
        on_host = torch.arange(max(1025, 2 * size), dtype=like.dtype)
        made = _offsets[key] = (on_host.to(like.device), on_host)
    return made[0][:size], made[1][:size]
