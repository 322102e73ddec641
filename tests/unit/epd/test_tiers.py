"""Free blocks: never given out twice, never lost, in as few pieces as the holes allow."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_epd.tiers import FreeRuns, Run, Tier, new_slab

BLOCKS = 24


def blocks_of(runs: tuple[Run, ...]) -> set[int]:
    return {block for run in runs for block in range(run.start, run.start + run.blocks)}


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, BLOCKS + 1)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_blocks_are_given_once_and_come_back(steps: list[tuple[bool, int]]) -> None:
    holes, free, taken = FreeRuns(BLOCKS), set(range(BLOCKS)), []
    for take, number in steps:
        if take:
            runs = holes.take(number)
            assert (runs is not None) == (0 < number <= len(free))
            if runs is not None:
                got = blocks_of(runs)
                assert len(got) == number
                assert got <= free
                assert list(runs) == sorted(runs)
                free -= got
                taken.append(runs)
        elif taken:
            runs = taken.pop(number % len(taken))
            holes.give(runs)
            free |= blocks_of(runs)
        assert holes.free == len(free)
        assert blocks_of(tuple(holes._runs)) == free
        assert all(a.start + a.blocks < b.start for a, b in zip(holes._runs, holes._runs[1:], strict=False)), "merged"


def test_the_smallest_hole_that_fits_is_taken() -> None:
    holes = FreeRuns(10)
    a, b, c = holes.take(3), holes.take(1), holes.take(2)
    assert a is not None
    assert b is not None
    assert c is not None
    holes.give(a)  # holes of 3 at 0 and of 4 at 6
    assert holes.take(2) == (Run(0, 2),)
    assert holes.take(4) == (Run(6, 4),)


def test_a_large_item_takes_the_largest_holes() -> None:
    holes = FreeRuns(12)
    runs = [holes.take(1) for _ in range(12)]
    for at in (0, 2, 3, 6, 7, 8, 10):
        run = runs[at]
        assert run is not None
        holes.give(run)
    assert holes.take(6) == (Run(0, 1), Run(2, 2), Run(6, 3))
    assert holes.free == 1


def test_pieces_end_with_the_item() -> None:
    tier = Tier("device", new_slab(64 * 8), 64)
    assert tier.capacity_bytes == 512
    runs = (Run(1, 2), Run(4, 1), Run(6, 2))
    assert tier.pieces(runs, 64 * 4 + 5) == ((64, 128), (256, 64), (384, 69))
    data = torch.arange(261, dtype=torch.int64).to(torch.uint8)
    pieces = tier.pieces(runs, 261)
    tier.write(pieces, data)
    assert torch.equal(tier.read(pieces), data)
    assert int(tier.slab[384 + 69 :].sum()) == 0, "nothing beyond the item is written"
    assert int(tier.slab[:64].sum()) == 0


def test_a_rest_smaller_than_a_block_is_not_used() -> None:
    tier = Tier("device", new_slab(64 * 3 + 63), 64)
    assert tier.capacity_bytes == 192
    assert [tier.blocks_for(size) for size in (1, 64, 65, 192, 193)] == [1, 1, 2, 3, 4]
