"""Random late-KV writes with poisoned caches, for Triton's interpreter on a CPU and for a real GPU alike.

Run as a script under ``TRITON_INTERPRET=1`` it checks some cases and ends with status 1 at the first failure:

    TRITON_INTERPRET=1 python tests/unit/kernels/late_kv_cases.py --cases 20 --seed 7
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import asdict, dataclass

import torch

from suite_kernels import late_kv, late_kv_reference
from suite_kernels.late_kv_caches import PagedCaches

FP8 = torch.float8_e4m3fn
POISON = 0xA5
# What one rounding of the dtype may differ by, relative to the value and to the largest element of its row; float32
# has room for a norm's sum taken in another order.
STEP = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, FP8: 2.0**-3}
# Physical orders of (blocks, position in block, kv_heads, K and V); L is the layer, shared storage where it is inside.
LAYOUTS = ("NHD", "HND", "BLHNC", "BHLNC", "separate")


@dataclass(frozen=True)
class Case:
    """One write. ``slots`` may be fewer than ``tokens``: the rest is padding of the batch."""

    tokens: int
    slots: int
    leaders: int
    heads: int
    head_dim: int
    rotary_dim: int
    block_size: int
    blocks: int
    layout: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    neox: bool
    norm: bool
    row_padding: int
    seed: int


def draw(seed: int) -> Case:
    """The case of a seed: odd shapes, every dtype, layout, RoPE style, padding and holes come up."""
    rng = random.Random(seed)
    dtype = rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    head_dim = rng.choice((64, 80, 96, 128, 36, 72, 2))
    rotary = rng.choice((head_dim, head_dim, head_dim // 2 & ~1 or 2, max(2, head_dim // 4 & ~1)))
    tokens = rng.choice((1, 2, 7, 16, 33, 50))
    block_size = rng.choice((16, 32, 1, 24))
    return Case(
        tokens=tokens,
        slots=max(0, tokens - rng.choice((0, 0, 0, 1, 5))),
        leaders=rng.choice((1, 2, 3, 5)),
        heads=rng.choice((1, 2, 3, 8)),
        head_dim=head_dim,
        rotary_dim=rotary,
        block_size=block_size,
        blocks=-(-tokens // block_size) + rng.choice((1, 4)),
        layout=rng.choice(LAYOUTS),
        dtype=dtype,
        cache_dtype=rng.choice((dtype, FP8)),
        neox=rng.random() < 0.6,
        norm=rng.random() < 0.5,
        row_padding=rng.choice((0, 0, 8, 3)),
        seed=seed,
    )


def allocate(case: Case, device: str) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Poisoned bytes, and each leader's K and V views into them in the case's layout."""
    size, head_dim, layers = case.cache_dtype.itemsize, case.head_dim, case.leaders
    content = case.blocks * case.block_size * case.heads * 2 * head_dim
    room = torch.full((layers * content * size + 64,), POISON, dtype=torch.uint8, device=device)
    whole = room[32 : 32 + layers * content * size].view(case.cache_dtype)
    blocks, block, heads = case.blocks, case.block_size, case.heads
    if case.layout == "separate":  # K and V apart, as older vLLM had them
        shaped = whole.view(layers, 2, blocks, block, heads, head_dim)
        return room, [(one[0], one[1]) for one in shaped]
    logical = {  # to [layers, blocks, block_size, kv_heads, 2 * head_dim]
        "NHD": lambda: whole.view(layers, blocks, block, heads, 2 * head_dim),
        "HND": lambda: whole.view(layers, blocks, heads, block, 2 * head_dim).transpose(2, 3),
        "BLHNC": lambda: whole.view(blocks, layers, heads, block, 2 * head_dim).permute(1, 0, 3, 2, 4),
        "BHLNC": lambda: whole.view(blocks, heads, layers, block, 2 * head_dim).permute(2, 0, 3, 1, 4),
    }[case.layout]()
    return room, [tuple(one.split(head_dim, dim=-1)) for one in logical]


def cos_sin(case: Case, length: int) -> torch.Tensor:
    inverse = 10000.0 ** -(torch.arange(0, case.rotary_dim, 2) / case.rotary_dim)
    angles = torch.arange(length)[:, None] * inverse
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(case.dtype)


def check(case: Case, device: str, exact: bool) -> float:
    """Write with kernel and reference into poisoned storage and compare every byte of it.

    Storage that no slot names must still be poison; V, which is copied or scaled, is bit-equal; K is bit-equal where
    ``exact`` holds and there is no norm (same float32 operations in the same order), else within a few roundings.

    Returns:
        Largest error of K in units of one rounding of the cache's dtype.

    Raises:
        AssertionError: with the case.
    """
    make = torch.Generator().manual_seed(case.seed)
    width = case.leaders * 2 * case.heads * case.head_dim
    wide = torch.randn(case.tokens, width + case.row_padding, generator=make)
    wide[torch.rand(wide.shape, generator=make) < 0.02] *= 1e-4
    wide[torch.rand(wide.shape, generator=make) < 0.02] *= 300
    wide[torch.rand(wide.shape, generator=make) < 0.02] = -0.0
    gemm = wide.to(case.dtype).to(device)[:, :width]
    positions = torch.randint(0, 500, (case.tokens,), generator=make)
    table = cos_sin(case, 500)
    capacity = case.blocks * case.block_size
    slots = torch.randperm(capacity, generator=make)[: case.slots]
    slots[torch.rand(slots.shape, generator=make) < 0.2] = -1
    if len(slots) > 2:
        slots[0], slots[1] = capacity, capacity + 10**12  # past the last block: nothing may be written
        positions[0], positions[1] = -(2**40), 2**40  # of rows without a slot, so never read
    weight = torch.randn(case.leaders, case.head_dim, generator=make).to(case.dtype) if case.norm else None
    scales = None
    if case.cache_dtype == FP8:
        scales = [(torch.rand(case.leaders, generator=make) * 2 + 0.1).tolist() for _ in "kv"]

    rooms, described = [], []
    for _ in range(2):
        room, views = allocate(case, device)
        rooms.append(room)
        described.append(PagedCaches.of(views, *(scales or (None, None))))
    for write, caches in zip((late_kv.write_late_kv, late_kv_reference.write_late_kv), described, strict=True):
        write(
            gemm,
            positions.to(device),
            table.to(device),
            slots.to(device),
            caches,
            is_neox_style=case.neox,
            k_norm_weight=None if weight is None else weight.to(device),
            eps=1e-5,
        )
    return compare(case, rooms, described, slots, exact)


def compare(
    case: Case, rooms: list[torch.Tensor], described: list[PagedCaches], slots: torch.Tensor, exact: bool
) -> float:
    """See :func:`check`. The slots that are meant are worked out here once more, element by element."""
    got, want = described
    # Forget each element that was to be written; what is left in both must be poison.
    left = [room.clone() for room in rooms]
    named = [
        (s // case.block_size, s % case.block_size) for s in slots.tolist() if 0 <= s < case.blocks * case.block_size
    ]
    worst = 0.0
    for layer in range(case.leaders):
        for kind, ours, theirs in (("K", got.keys, want.keys), ("V", got.values, want.values)):
            for block, offset in named:
                a, b = ours[layer][block, offset], theirs[layer][block, offset]
                equal = torch.equal(a.view(torch.uint8), b.view(torch.uint8))
                where = f"{kind} of layer {layer}, block {block}, offset {offset}: {a} is not {b}; {asdict(case)}"
                if not equal:
                    assert kind == "K", where
                    assert case.norm or not exact, where
                    unit = STEP[case.cache_dtype]
                    x, y = a.float(), b.float()
                    error = float(((x - y).abs() / ((y.abs() + 0.1 * y.abs().amax(-1, keepdim=True)) * unit)).max())
                    worst = max(worst, error)
                    assert error < 3, where
    for caches, room in zip(described, left, strict=True):
        base = rooms[described.index(caches)].data_ptr()
        for view in (*caches.keys, *caches.values):
            size = view.element_size()
            start = (view.data_ptr() - base) // size
            assert (view.data_ptr() - base) % size == 0
            typed = room[: room.numel() // size * size].view(view.dtype)
            copy = typed.as_strided(view.shape, view.stride(), start).view(torch.uint8)
            for block, offset in named:
                copy[block, offset] = POISON
        assert bool((room == POISON).all()), f"wrote where no slot points: {asdict(case)}"
    return worst


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 30) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    for case_seed in range(seed, seed + args.cases):
        case = draw(case_seed)
        try:
            worst = check(case, "cpu", exact=True)
        except AssertionError as error:
            print(f"FAILED seed {case_seed}: {error}")
            return 1
        print(f"ok {worst:.2f} {asdict(case)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
