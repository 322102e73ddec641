"""K and V of all late layers of a SwiftKV model into their paged caches, in one launch.

The head of a SwiftKV model ends in one GEMM whose output holds K and V of every late layer that owns a cache (a
"leader"). vLLM's operators would take it apart again: a norm and a RoPE over K, then one scatter per layer. Here one
Triton kernel reads the GEMM's output once and writes every cache once, so that its bound is the copy of those bytes.

The kernel's place in a graph is the caller's business: torch sees no write through an address, so a compiled region
must hold the call in an opaque operator whose result is used, or it is removed as dead code.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from suite_kernels.late_kv_caches import PagedCaches, check_call

__all__ = ["MEASURED_FASTER", "Choice", "PagedCaches", "Setting", "available", "choose", "write_late_kv"]

Setting = Literal["auto", "on", "off"]

# Devices (``torch.cuda.get_device_name``) where a committed result of benchmarks/gpu_late_kv.py shows the kernel
# ahead of vLLM's operators at every size. Empty: no GPU has run it.
MEASURED_FASTER: frozenset[str] = frozenset()

_ELEMENTS_PER_PROGRAM = 2048
_WARPS = 4


@dataclass(frozen=True)
class Choice:
    """Whether the kernel writes late KV here, and why, in words for a log line."""

    kernel: bool
    reason: str


def available(device: torch.device | str) -> bool:
    """Whether Triton compiles for this device: an NVIDIA GPU of compute capability 8.0 or more."""
    return _obstacle(torch.device(device), None) is None


def choose(device: torch.device | str, cache_dtype: torch.dtype, setting: Setting = "auto") -> Choice:
    """Decide between the kernel and vLLM's own operators; call it once, when the caches are bound.

    Args:
        device: of the caches.
        cache_dtype: their dtype; FP8 needs compute capability 8.9.
        setting: ``auto`` takes the kernel where a committed measurement shows it faster (see MEASURED_FASTER; none
            does yet), ``on`` wherever it can run, ``off`` nowhere.

    Raises:
        ValueError: an unknown setting, or ``on`` where the kernel cannot run.
    """
    if setting not in ("auto", "on", "off"):
        raise ValueError(f"late KV kernel: unknown setting {setting!r}; one of auto, on, off")
    if setting == "off":
        return Choice(False, "switched off")
    device = torch.device(device)
    obstacle = _obstacle(device, cache_dtype)
    if setting == "on":
        if obstacle is not None:
            raise ValueError(f"the late KV kernel was asked for, but {obstacle}; set it to auto or off")
        return Choice(True, "switched on")
    if obstacle is not None:
        return Choice(False, obstacle)
    name = torch.cuda.get_device_name(device)
    if name not in MEASURED_FASTER:
        return Choice(False, f"not measured on {name}")
    return Choice(True, f"measured faster on {name}")


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
    """Write K and V of one step into every leader's cache. Asynchronous; safe inside a CUDA graph.

    Args:
        late_kv: [tokens, leaders * 2 * kv_heads * head_dim], the fused projection: per leader K, then V. Rows may lie
            further apart than they are long. bf16, fp16 or fp32, the caches' own dtype unless those are FP8.
        positions: [tokens] int64, each below ``len(cos_sin_cache)``; read for rows with a slot only.
        cos_sin_cache: [positions, rotary_dim] as vLLM's rotary layers hold it, cosines first; rotary_dim <= head_dim.
        slot_mapping: [tokens or fewer] int64, ``block * block_size + offset``. Rows beyond its end, and slots that
            are negative or past the last block, write nothing. Slots of one step are distinct.
        caches: where to, built once with :meth:`PagedCaches.of`.
        is_neox_style: RoPE turns halves against each other; else neighbours (GPT-J style).
        k_norm_weight: [leaders, head_dim], an RMS norm of each K head before RoPE.
        eps: of that norm.

    Raises:
        ValueError: arguments that do not fit the caches.
        RuntimeError: Triton cannot run on the caches' device.
    """
    num_tokens = check_call(late_kv, positions, cos_sin_cache, slot_mapping, caches, k_norm_weight)
    from suite_kernels.late_kv_triton import INTERPRETED, late_kv_kernel

    if caches.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"the late KV kernel runs on CUDA devices; the caches are on {caches.device}")
    if num_tokens == 0:
        return
    shape = launch_shape(caches.head_dim, cos_sin_cache.shape[1])
    rows = num_tokens * caches.kv_heads
    grid = (-(-rows // shape["ROWS"]) * caches.leaders,)
    late_kv_kernel[grid](
        late_kv,
        positions,
        cos_sin_cache,
        k_norm_weight,
        slot_mapping,
        caches.keys[0],
        caches.pointers,
        caches.inverse_scales,
        num_tokens,
        caches.num_slots,
        late_kv.stride(0),
        cos_sin_cache.stride(0),
        caches.block_stride,
        caches.position_stride,
        caches.head_stride,
        eps,
        LEADERS=caches.leaders,
        HEADS=caches.kv_heads,
        DIM=caches.head_dim,
        ROTARY=cos_sin_cache.shape[1],
        BLOCK_SIZE=caches.block_size,
        NEOX=is_neox_style,
        ALIGNMENT=caches.alignment,
        SOFT=INTERPRETED,
        num_warps=_WARPS,
        enable_fp_fusion=False,  # K is then bit-equal to the reference, for a few instructions more
        **shape,
    )


def launch_shape(head_dim: int, rotary_dim: int) -> dict[str, int]:
    """Tile of one program: (token, head) rows, and each part of a row padded to a power of two."""
    dim = _power_of_two(head_dim)
    return {
        "ROWS": max(1, _ELEMENTS_PER_PROGRAM // dim),
        "DIM_PADDED": dim,
        "HALF_PADDED": _power_of_two(rotary_dim // 2),
        "REST_PADDED": _power_of_two(head_dim - rotary_dim),
    }


def _power_of_two(length: int) -> int:
    return 1 << max(0, length - 1).bit_length()


def _obstacle(device: torch.device, cache_dtype: torch.dtype | None) -> str | None:
    """Why the kernel cannot run, or None."""
    if device.type != "cuda":
        return f"it runs on CUDA devices and the caches are on {device}"
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "it was never run on ROCm"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    from suite_kernels.late_kv_triton import INTERPRETED

    if INTERPRETED:
        return "TRITON_INTERPRET is set"
    capability = torch.cuda.get_device_capability(device)
    wanted = (8, 9) if cache_dtype == torch.float8_e4m3fn else (8, 0)
    if capability < wanted:
        return f"compute capability {wanted[0]}.{wanted[1]} is needed, this is {capability[0]}.{capability[1]}"
    return None
