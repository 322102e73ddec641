"""Where late K and V go, and the checks that the kernel and its torch reference share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

VECTOR_BYTES = 16
CACHE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class PagedCaches:
    """The paged caches of all leaders, described once; build it with :meth:`of`.

    Holding it keeps the cache tensors alive, so that ``pointers`` stay valid. Build it anew when the engine
    allocates other caches or loads other scales: both are read here, never again.

    Attributes:
        keys, values: per leader a view [blocks, block_size, kv_heads, head_dim].
        pointers: [leaders, 2] int64 on the caches' device, the addresses of each K and V view.
        inverse_scales: [leaders, 2] float32 on the same device, 1 / k_scale and 1 / v_scale; None unless FP8.
        block_stride, position_stride, head_stride: in elements, the same for every view.
        alignment: bytes that divide every view's address, at most 16.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    pointers: torch.Tensor
    inverse_scales: torch.Tensor | None
    block_stride: int
    position_stride: int
    head_stride: int
    alignment: int

    @classmethod
    def of(
        cls,
        views: Sequence[tuple[torch.Tensor, torch.Tensor]],
        k_scales: Sequence[float | torch.Tensor] | None = None,
        v_scales: Sequence[float | torch.Tensor] | None = None,
    ) -> PagedCaches:
        """Describe the caches of the leaders, in the order of the fused projection.

        Args:
            views: per leader the key and the value cache, each [blocks, block_size, kv_heads, head_dim] with the
                last dimension contiguous and any other strides, so NHD, HND and layers interleaved within blocks
                alike. vLLM 0.32 allocates [blocks, kv_heads, block_size, 2 * head_dim], from which its backends
                make such views: ``kv_cache.transpose(1, 2).split(head_dim, dim=-1)``. A cache that vLLM holds as
                uint8 is passed as ``view(torch.float8_e4m3fn)``.
            k_scales, v_scales: one positive number per leader, for FP8 caches and for them only; a stored value
                is ``x / scale``.

        Raises:
            ValueError: views that differ in shape, strides, dtype or device, or scales that do not fit them.
        """
        if not views:
            raise ValueError("late KV: no caches given; a SwiftKV model has at least one late layer that owns one")
        first = views[0][0]
        _check_first(first)
        for index, pair in enumerate(views):
            for name, view in zip(("key", "value"), pair, strict=True):
                _check_alike(first, view, f"{name} cache of late layer {index}")
        keys, values = zip(*views, strict=True)
        addresses = [[key.data_ptr(), value.data_ptr()] for key, value in views]
        block, position, head, _ = first.stride()
        return cls(
            keys=keys,
            values=values,
            pointers=torch.tensor(addresses, dtype=torch.int64, device=first.device),
            inverse_scales=_inverse_scales(first, len(views), k_scales, v_scales),
            block_stride=block,
            position_stride=position,
            head_stride=head,
            alignment=math.gcd(VECTOR_BYTES, *(address for pair in addresses for address in pair)),
        )

    @property
    def leaders(self) -> int:
        return len(self.keys)

    @property
    def dtype(self) -> torch.dtype:
        return self.keys[0].dtype

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def block_size(self) -> int:
        return int(self.keys[0].shape[1])

    @property
    def num_slots(self) -> int:
        return int(self.keys[0].shape[0]) * self.block_size

    @property
    def kv_heads(self) -> int:
        return int(self.keys[0].shape[2])

    @property
    def head_dim(self) -> int:
        return int(self.keys[0].shape[3])

    @property
    def width(self) -> int:
        """Columns of the fused projection: leaders * 2 * kv_heads * head_dim."""
        return self.leaders * 2 * self.kv_heads * self.head_dim


def check_call(
    late_kv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    caches: PagedCaches,
    k_norm_weight: torch.Tensor | None,
) -> int:
    """Check the arguments of one write against the caches, on the host and without a synchronisation.

    Returns:
        Number of tokens to write: rows beyond the slot mapping are padding.

    Raises:
        ValueError: with the argument, what it is and what it should be.
    """
    if late_kv.ndim != 2 or late_kv.shape[1] != caches.width or late_kv.stride(1) != 1:
        raise ValueError(
            f"late_kv has shape {tuple(late_kv.shape)} and strides {late_kv.stride()}; wanted [tokens, {caches.width}] "
            f"({caches.leaders} layers * 2 * {caches.kv_heads} heads * {caches.head_dim}), contiguous along a row"
        )
    fp8 = caches.inverse_scales is not None
    if late_kv.dtype not in CACHE_DTYPES[:3] or not (fp8 or late_kv.dtype == caches.dtype):
        raise ValueError(f"late_kv is {late_kv.dtype}, which does not go into a {caches.dtype} cache")
    num_tokens = min(late_kv.shape[0], slot_mapping.shape[0])
    for name, vector, length in (("positions", positions, num_tokens), ("slot_mapping", slot_mapping, 0)):
        if vector.ndim != 1 or vector.dtype != torch.int64 or not vector.is_contiguous() or len(vector) < length:
            raise ValueError(
                f"{name} is {vector.dtype} of shape {tuple(vector.shape)}; wanted contiguous int64, "
                f"[{num_tokens}] or more"
            )
    rotary_dim = cos_sin_cache.shape[-1]
    if cos_sin_cache.ndim != 2 or cos_sin_cache.stride(1) != 1 or rotary_dim % 2 or rotary_dim > caches.head_dim:
        raise ValueError(
            f"cos_sin_cache has shape {tuple(cos_sin_cache.shape)}; wanted [positions, rotary_dim] with an even "
            f"rotary_dim of at most {caches.head_dim}"
        )
    if k_norm_weight is not None and (
        tuple(k_norm_weight.shape) != (caches.leaders, caches.head_dim) or not k_norm_weight.is_contiguous()
    ):
        raise ValueError(
            f"k_norm_weight has shape {tuple(k_norm_weight.shape)}; wanted contiguous "
            f"[{caches.leaders}, {caches.head_dim}]"
        )
    for name, tensor in (
        ("late_kv", late_kv),
        ("positions", positions),
        ("cos_sin_cache", cos_sin_cache),
        ("slot_mapping", slot_mapping),
        ("k_norm_weight", k_norm_weight),
    ):
        if tensor is not None and tensor.device != caches.device:
            raise ValueError(f"{name} is on {tensor.device}, the caches are on {caches.device}")
    return int(num_tokens)


def _check_first(view: torch.Tensor) -> None:
    if view.ndim != 4 or view.stride(3) != 1:
        raise ValueError(
            f"late KV: a cache view has shape {tuple(view.shape)} and strides {view.stride()}; wanted "
            "[blocks, block_size, kv_heads, head_dim] with the last dimension contiguous"
        )
    if view.dtype not in CACHE_DTYPES:
        hint = "; pass an FP8 cache as view(torch.float8_e4m3fn)" if view.dtype == torch.uint8 else ""
        raise ValueError(f"late KV: caches of {view.dtype} are not supported{hint}")


def _check_alike(first: torch.Tensor, view: torch.Tensor, name: str) -> None:
    for what, wanted, found in (
        ("shape", tuple(first.shape), tuple(view.shape)),
        ("strides", first.stride(), view.stride()),
        ("dtype", first.dtype, view.dtype),
        ("device", first.device, view.device),
    ):
        if wanted != found:
            raise ValueError(
                f"late KV: the {name} has {what} {found}, the key cache of late layer 0 has {wanted}; one launch "
                "writes caches that are laid out alike"
            )


def _inverse_scales(
    first: torch.Tensor,
    leaders: int,
    k_scales: Sequence[float | torch.Tensor] | None,
    v_scales: Sequence[float | torch.Tensor] | None,
) -> torch.Tensor | None:
    if first.dtype != torch.float8_e4m3fn:
        if k_scales is not None or v_scales is not None:
            raise ValueError(f"late KV: scales were given for caches of {first.dtype}, which hold no scaled values")
        return None
    if k_scales is None or v_scales is None or len(k_scales) != leaders or len(v_scales) != leaders:
        raise ValueError(f"late KV: FP8 caches need one k_scale and one v_scale for each of {leaders} layers")
    scales = torch.tensor([[float(k), float(v)] for k, v in zip(k_scales, v_scales, strict=True)])
    if not bool(torch.all(torch.isfinite(scales) & (scales > 0))):
        raise ValueError(f"late KV: scales are positive and finite; got k, v per layer {scales.tolist()}")
    return (1.0 / scales).to(first.device)
