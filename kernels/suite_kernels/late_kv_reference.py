"""What :mod:`suite_kernels.late_kv` computes, in plain torch on any device.

Rounding is that of the separate operators that it stands for: K is rounded to the activation's dtype after the norm
and again after RoPE, and an FP8 cache takes that value times 1 / scale, saturated. Between those points all is float32.
"""

from __future__ import annotations

import torch

from suite_kernels.late_kv_caches import PagedCaches, check_call

FP8_MAX = 448.0


def write_late_kv(
    late_kv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    caches: PagedCaches,
    *,
    is_neox_style: bool,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Same arguments and effect as :func:`suite_kernels.late_kv.write_late_kv`; synchronises where on a GPU."""
    num_tokens = check_call(late_kv, positions, cos_sin_cache, slot_mapping, caches, k_norm_weight)
    slots = slot_mapping[:num_tokens]
    live = torch.nonzero((slots >= 0) & (slots < caches.num_slots)).flatten()
    rows = late_kv[live].unflatten(1, (caches.leaders, 2, caches.kv_heads, caches.head_dim))
    k, v = rows[:, :, 0], rows[:, :, 1]
    if k_norm_weight is not None:
        k = rms_norm(k, k_norm_weight[:, None], eps)
    k = rotate(k, cos_sin_cache[positions[live]][:, None, None], is_neox_style)
    if caches.inverse_scales is not None:
        k = to_fp8(k, caches.inverse_scales[:, 0, None, None])
        v = to_fp8(v, caches.inverse_scales[:, 1, None, None])
    block, offset = slots[live] // caches.block_size, slots[live] % caches.block_size
    for index, (key, value) in enumerate(zip(caches.keys, caches.values, strict=True)):
        for cache, new in ((key, k[:, index]), (value, v[:, index])):
            if caches.inverse_scales is not None:  # torch scatters no FP8, so its bytes
                cache, new = cache.view(torch.uint8), new.view(torch.uint8)
            cache[block, offset] = new


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm over the last dimension in float32, times ``weight`` in the weight's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(weight.dtype) * weight).to(x.dtype)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, is_neox_style: bool) -> torch.Tensor:
    """RoPE in float32 on the first ``cos_sin.shape[-1]`` elements of the last dimension; the rest passes through.

    Neox style turns element i with element i + rotary_dim / 2, GPT-J style each even element with the next.
    """
    rotary_dim = cos_sin.shape[-1]
    cos, sin = cos_sin.float().chunk(2, dim=-1)
    turned = x[..., :rotary_dim].float()
    first, second = turned.chunk(2, dim=-1) if is_neox_style else (turned[..., 0::2], turned[..., 1::2])
    pair = (first * cos - second * sin, second * cos + first * sin)
    out = torch.cat(pair, dim=-1) if is_neox_style else torch.stack(pair, dim=-1).flatten(-2)
    return torch.cat((out.to(x.dtype), x[..., rotary_dim:]), dim=-1)


def to_fp8(x: torch.Tensor, inverse_scale: torch.Tensor) -> torch.Tensor:
    """``x * inverse_scale`` as e4m3, saturated at 448; NaN stays NaN."""
    return (x.float() * inverse_scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
