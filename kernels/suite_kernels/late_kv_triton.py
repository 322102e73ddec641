# Triton types a kernel's arguments at its launch, not by annotations.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""The Triton kernel of :mod:`suite_kernels.late_kv`. Importing this imports triton; nothing else here does.

One program takes ROWS (token, head) rows of one leader, K and V. Choices, made from the memory system and from the
code that the compiler emits for sm_90 (``tests/unit/kernels`` compiles it); none was timed on a GPU yet:

* A row is head_dim contiguous elements in the GEMM's output and in the cache, so every access is whole 32-byte
  sectors whatever the cache's layout, and each thread moves 16 bytes at a time. The compiler knows no alignment of
  an address read from a table, so it is told.
* With 16 rows of 128 elements and 4 warps each thread has four 16-byte loads in flight, some 64 KiB per SM; HBM3e
  needs about 25 KiB per SM to be busy.
* The loads of K and V do not wait for the slot: rows that are padding are read in vain, but only rows of the batch's
  padding are. cos and sin wait for the position anyway.
* Neighbouring programs take the leaders of the same tokens, which is contiguous input, and the cos and sin they
  share come from L2.
* Rows, never caches, bound 32-bit indices: cache offsets and token offsets are 64-bit.

Nothing is tuned at run time, so a server's first long prompt does not meet a tuning sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of Triton's interpreter: its casts to bf16 and FP8 truncate, where the hardware rounds to nearest even. There the
# kernel rounds first, in float32, and the cast is exact.
INTERPRETED: bool = triton.knobs.runtime.interpret

FP8_MAX = tl.constexpr(448.0)


@triton.jit
def _narrow(x, dtype: tl.constexpr, SOFT: tl.constexpr):
    """float32 to a narrower dtype, to nearest even; FP8 saturates and keeps NaN."""
    if SOFT and dtype == tl.float8e4nv:  # NVIDIA's conversion saturates by itself
        x = tl.clamp(x, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    if SOFT and (dtype == tl.bfloat16 or dtype == tl.float8e4nv):
        dropped: tl.constexpr = 16 if dtype == tl.bfloat16 else 20
        bits = x.to(tl.int32, bitcast=True)
        negative = bits < 0
        bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        rounded = ((bits >> dropped) << dropped).to(tl.float32, bitcast=True)
        if dtype == tl.float8e4nv:
            # Below 2^-6 e4m3 steps by 2^-9; adding and taking away 1.5 * 2^14 rounds to that.
            step = (tl.abs(x) + 24576.0) - 24576.0
            rounded = tl.where(tl.abs(x) < 0.015625, tl.where(negative, -step, step), rounded)
            nan = tl.full(x.shape, 0x7FF00000, tl.int32).to(tl.float32, bitcast=True)
            rounded = tl.where(x != x, nan, rounded)
        else:
            rounded = tl.where(x != x, x, rounded)
        x = rounded
    return x.to(dtype)


@triton.jit
def _stored(x, inverse_scale, dtype: tl.constexpr, FP8: tl.constexpr, SOFT: tl.constexpr):
    """A value as the cache holds it."""
    if FP8:
        x = _narrow(x.to(tl.float32) * inverse_scale, dtype, SOFT)
    return x


@triton.jit
def _normed(x, root, weight, dtype: tl.constexpr, SOFT: tl.constexpr):
    """x * root * weight, rounded where separate operators round; float32."""
    x = _narrow(x * root[:, None], weight.dtype, SOFT).to(tl.float32) * weight.to(tl.float32)[None, :]
    x = _narrow(x, weight.dtype, SOFT).to(tl.float32)
    return _narrow(x, dtype, SOFT).to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def late_kv_kernel(
    late_kv,  # [tokens, LEADERS, 2, HEADS, DIM], row_stride between tokens
    positions,  # [tokens] int64
    cos_sin,  # [positions, ROTARY], first half cos
    norm_weight,  # [LEADERS, DIM] or None
    slots,  # [tokens] int64
    like,  # any cache view: gives the type of the addresses
    pointers,  # [LEADERS, 2] int64
    inverse_scales,  # [LEADERS, 2] float32 or None
    num_tokens,
    num_slots,
    row_stride,
    cos_stride,
    block_stride,
    position_stride,
    head_stride,
    eps,
    LEADERS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NEOX: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    SOFT: tl.constexpr,
):
    leader = tl.program_id(0) % LEADERS
    row = (tl.program_id(0) // LEADERS) * ROWS + tl.arange(0, ROWS)
    token = (row // HEADS).to(tl.int64)
    head = row % HEADS
    inside = token < num_tokens
    slot = tl.load(slots + token, mask=inside, other=-1)
    live = (slot >= 0) & (slot < num_slots)
    position = tl.load(positions + token, mask=inside, other=0)

    source = late_kv + token * row_stride + (leader * 2 * HEADS + head) * DIM
    target = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * position_stride
    target += head.to(tl.int64) * head_stride
    keys = tl.multiple_of(tl.load(pointers + 2 * leader).to(like.dtype), ALIGNMENT)
    values = tl.multiple_of(tl.load(pointers + 2 * leader + 1).to(like.dtype), ALIGNMENT)
    out: tl.constexpr = like.dtype.element_ty
    kept: tl.constexpr = late_kv.dtype.element_ty
    FP8: tl.constexpr = inverse_scales is not None
    k_inverse = 1.0
    v_inverse = 1.0
    if FP8:
        k_inverse = tl.load(inverse_scales + 2 * leader)
        v_inverse = tl.load(inverse_scales + 2 * leader + 1)

    HALF: tl.constexpr = ROTARY // 2
    half = tl.arange(0, HALF_PADDED)
    half_in = (half < HALF)[None, :]
    pair = tl.arange(0, 2 * HALF_PADDED)
    pair_in = (pair < ROTARY)[None, :]
    rest = ROTARY + tl.arange(0, REST_PADDED)
    rest_in = (rest < DIM)[None, :]
    dim = tl.arange(0, DIM_PADDED)
    dim_in = (dim < DIM)[None, :]

    value = tl.load(source[:, None] + (HEADS * DIM + dim)[None, :], mask=inside[:, None] & dim_in)
    if NEOX:
        first = tl.load(source[:, None] + half[None, :], mask=inside[:, None] & half_in, other=0.0)
        second = tl.load(source[:, None] + (HALF + half)[None, :], mask=inside[:, None] & half_in, other=0.0)
    else:
        both = tl.load(source[:, None] + pair[None, :], mask=inside[:, None] & pair_in, other=0.0)
        first, second = tl.split(both.reshape(ROWS, HALF_PADDED, 2))
    if ROTARY < DIM:
        passing = tl.load(source[:, None] + rest[None, :], mask=inside[:, None] & rest_in, other=0.0)
    angle = cos_sin + position * cos_stride
    cos = tl.load(angle[:, None] + half[None, :], mask=live[:, None] & half_in, other=0.0).to(tl.float32)
    sin = tl.load(angle[:, None] + (HALF + half)[None, :], mask=live[:, None] & half_in, other=0.0).to(tl.float32)

    x, y = first.to(tl.float32), second.to(tl.float32)
    if norm_weight is not None:
        squares = tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)
        if ROTARY < DIM:
            z = passing.to(tl.float32)
            squares += tl.sum(z * z, axis=1)
        root = tl.rsqrt(squares / DIM + eps)
        weight = norm_weight + leader * DIM
        if NEOX:
            x_weight = tl.load(weight + half, mask=half < HALF, other=0.0)
            y_weight = tl.load(weight + HALF + half, mask=half < HALF, other=0.0)
        else:
            x_weight = tl.load(weight + 2 * half, mask=half < HALF, other=0.0)
            y_weight = tl.load(weight + 2 * half + 1, mask=half < HALF, other=0.0)
        x = _normed(x, root, x_weight, kept, SOFT)
        y = _normed(y, root, y_weight, kept, SOFT)
        if ROTARY < DIM:
            z_weight = tl.load(weight + rest, mask=rest < DIM, other=0.0)
            passing = _narrow(_normed(z, root, z_weight, kept, SOFT), kept, SOFT)

    turned_x = _stored(_narrow(x * cos - y * sin, kept, SOFT), k_inverse, out, FP8, SOFT)
    turned_y = _stored(_narrow(y * cos + x * sin, kept, SOFT), k_inverse, out, FP8, SOFT)
    k_row = keys + target
    if NEOX:
        tl.store(k_row[:, None] + half[None, :], turned_x, mask=live[:, None] & half_in)
        tl.store(k_row[:, None] + (HALF + half)[None, :], turned_y, mask=live[:, None] & half_in)
    else:
        turned = tl.join(turned_x, turned_y).reshape(ROWS, 2 * HALF_PADDED)
        tl.store(k_row[:, None] + pair[None, :], turned, mask=live[:, None] & pair_in)
    if ROTARY < DIM:
        rest_out = _stored(passing, k_inverse, out, FP8, SOFT)
        tl.store(k_row[:, None] + rest[None, :], rest_out, mask=live[:, None] & rest_in)
    v_row = values + target
    v_out = _stored(value, v_inverse, out, FP8, SOFT)
    tl.store(v_row[:, None] + dim[None, :], v_out, mask=live[:, None] & dim_in)
