"""One write whose element offsets pass 2**31, run under ``TRITON_INTERPRET=1``; prints ok or dies.

The storage is 4 GiB of address space of which a few pages are touched.
"""

from __future__ import annotations

import torch

from suite_kernels import late_kv, late_kv_reference
from suite_kernels.late_kv_caches import PagedCaches

BLOCK, HEADS, DIM, STRIDE = 16, 2, 64, 2**30 + 64


def main() -> None:
    view_shape, strides = (3, BLOCK, HEADS, DIM), (STRIDE, HEADS * 2 * DIM, 2 * DIM, 1)
    room = torch.empty(2 * STRIDE + 2 * BLOCK * HEADS * 2 * DIM, dtype=torch.bfloat16)
    near = torch.empty(3 * 2 * BLOCK * HEADS * 2 * DIM, dtype=torch.bfloat16)
    make = torch.Generator().manual_seed(3)
    gemm = torch.randn(4, 2 * HEADS * DIM, generator=make).to(torch.bfloat16)
    table = torch.randn(8, DIM, generator=make).to(torch.bfloat16)
    positions, slots = torch.arange(4), torch.tensor([2 * BLOCK, 3, 3 * BLOCK - 1, BLOCK + 5])
    far = tuple(room.as_strided(view_shape, strides, start) for start in (0, DIM))
    close_strides = (BLOCK * HEADS * 2 * DIM, *strides[1:])
    close = tuple(near.as_strided(view_shape, close_strides, start) for start in (0, DIM))
    late_kv.write_late_kv(gemm, positions, table, slots, PagedCaches.of([far]), is_neox_style=True)
    late_kv_reference.write_late_kv(gemm, positions, table, slots, PagedCaches.of([close]), is_neox_style=True)
    for slot in slots.tolist():
        for ours, theirs in zip(far, close, strict=True):
            assert torch.equal(ours[slot // BLOCK, slot % BLOCK], theirs[slot // BLOCK, slot % BLOCK]), slot
    print("ok")


if __name__ == "__main__":
    main()
