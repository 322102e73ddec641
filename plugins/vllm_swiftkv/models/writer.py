"""How late keys and values get into the paged caches: vLLM's operator per layer, or one kernel for all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from suite_kernels import late_kv as kernel
from vllm_suite.compat import paged_cache
from vllm_suite.compat.models import get_forward_context, unified_kv_cache_update
from vllm_swiftkv.families import SwiftKVError

_log = logging.getLogger("vllm.suite.swiftkv")

_KERNEL_CACHES = {"auto": None, "bfloat16": None, "float16": None, "fp8": torch.float8_e4m3fn}
_KERNEL_CACHES["fp8_e4m3"] = torch.float8_e4m3fn


class OperatorWriter:
    """vLLM's own operator, once per leader."""

    def __init__(self, attentions: Sequence[Any]) -> None:
        self._names = tuple(attention.layer_name for attention in attentions)

    def write(self, positions: torch.Tensor, *late: torch.Tensor) -> None:
        """``late`` is K with RoPE and V, each [tokens, leaders, kv_heads, head_dim]."""
        k, v = late
        for j, name in enumerate(self._names):
            unified_kv_cache_update(k[:, j], v[:, j], name)


class KernelWriter:
    """One Triton kernel that also applies K norm and RoPE; see `suite_kernels.late_kv`.

    ``k_norms`` are the leaders' norm modules, empty where the family has none.
    """

    def __init__(self, attentions: Sequence[Any], rotary_emb: Any, k_norms: Sequence[Any]) -> None:
        self._attentions = tuple(attentions)
        self._rotary = rotary_emb
        self._norms = tuple(k_norms)
        self._weights: torch.Tensor | None = None
        self._caches: kernel.PagedCaches | None = None
        self._bound_to = 0

    def write(self, positions: torch.Tensor, *late: torch.Tensor) -> None:
        """``late`` is the fused projection [tokens, leaders * 2 * kv_heads * head_dim]; ``positions`` [tokens]."""
        (projected,) = late
        slots = get_forward_context().slot_mapping
        mine = slots.get(self._attentions[0].layer_name) if isinstance(slots, dict) else None
        if mine is None:  # a profiling run: there is no cache yet
            return
        kernel.write_late_kv(
            projected,
            positions,
            self._rotary.cos_sin_cache,
            mine,
            self._bind(),
            is_neox_style=self._rotary.is_neox_style,
            k_norm_weight=self._weights,
            eps=self._norms[0].variance_epsilon if self._norms else 1e-6,
        )

    def _bind(self) -> kernel.PagedCaches:
        # vLLM gives the layers other caches after profiling, and after a sleep.
        address = paged_cache.address(self._attentions[0])
        if self._caches is None or address != self._bound_to:
            stored = _KERNEL_CACHES[self._attentions[0].kv_cache_dtype]
            scales = [paged_cache.scales(a) for a in self._attentions] if stored is not None else []
            self._caches = kernel.PagedCaches.of(
                [paged_cache.views(a, stored) for a in self._attentions],
                [k for k, _ in scales] or None,
                [v for _, v in scales] or None,
            )
            self._weights = torch.stack([norm.weight.data for norm in self._norms]) if self._norms else None
            self._bound_to = address
        return self._caches


def make_writer(
    setting: Any, device: torch.device, attentions: Sequence[Any], rotary_emb: Any, k_norms: Sequence[Any]
) -> OperatorWriter | KernelWriter:
    """The writer that ``late_kv_kernel`` asks for. Raises SwiftKVError for ``on`` where the kernel cannot run."""
    first = attentions[0]
    backend, cache = first.attn_backend.get_name(), first.kv_cache_dtype
    obstacle = None
    if backend not in paged_cache.SPLIT_BACKENDS:
        obstacle = f"attention backend {backend} keeps its cache in a layout of its own"
    elif cache not in _KERNEL_CACHES:
        obstacle = f"the KV cache is {cache}"
    elif not hasattr(rotary_emb, "cos_sin_cache"):
        obstacle = f"{type(rotary_emb).__name__} keeps no cosines and sines"
    if obstacle is not None:
        if setting == "on":
            raise SwiftKVError(f"late_kv_kernel is on, but {obstacle}; set it to auto or off")
        _log.debug("late keys and values: vLLM's operator per layer (%s)", obstacle)
        return OperatorWriter(attentions)
    try:
        choice = kernel.choose(device, _KERNEL_CACHES[cache] or torch.get_default_dtype(), setting)
    except ValueError as error:
        raise SwiftKVError(str(error)) from error
    _log.debug("late keys and values: %s (%s)", "one kernel" if choice.kernel else "vLLM's operator", choice.reason)
    return KernelWriter(attentions, rotary_emb, k_norms) if choice.kernel else OperatorWriter(attentions)
