"""The checksum: the same wherever and however the bytes lie, another for every change; and the test for finiteness."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_epd.checksum import CHECKSUM_BYTES, _keys, checksum, finite, flat_bytes, measure

SEED = 0x5EED
ROW = 4096  # bytes that one row of the checksum covers
MASK = (1 << 64) - 1


def plain_checksum(data: bytes, seed: int) -> bytes:
    """The definition, in Python's integers."""
    keys, extra = _keys(seed)
    rows = [data[at : at + ROW].ljust(ROW, b"\0") for at in range(0, len(data), ROW)]
    result = b""
    for lane, (step, start, end) in enumerate(extra):
        odd = keys[lane].tolist()
        total = 0
        for index, row in enumerate(rows):
            words = [int.from_bytes(row[at : at + 4], "little", signed=True) for at in range(0, ROW, 4)]
            x = sum(word * key for word, key in zip(words, odd, strict=True)) & MASK
            x ^= (index * (step | 1) + start) & MASK
            x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
            x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
            total += x ^ (x >> 31)
        result += ((total + len(data) * (end | 1)) & MASK).to_bytes(8, "little")
    return result


def noise(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(data=st.binary(max_size=3 * ROW), seed=st.integers(0, MASK))
@settings(max_examples=60, deadline=None)
def test_it_is_what_its_definition_says(data: bytes, seed: int) -> None:
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    assert checksum(tensor, seed) == plain_checksum(data, seed)


@pytest.mark.parametrize("size", [ROW * 64, ROW * 64 + 4, ROW * 200 + 17])
def test_more_rows_than_are_widened_at_a_time(size: int) -> None:
    data = noise(size)
    assert checksum(data, SEED) == plain_checksum(bytes(data.tolist()), SEED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 256), (100, 1001)])
def test_dtype_and_shape_do_not_matter_only_bytes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert checksum(values, SEED) == checksum(flat_bytes(values).clone(), SEED)
    assert len(checksum(values, SEED)) == CHECKSUM_BYTES


@pytest.mark.parametrize("offset", range(1, 9))
def test_where_the_bytes_lie_does_not_matter(offset: int) -> None:
    data = noise(ROW * 3 + 100)
    moved = torch.zeros(data.numel() + 16, dtype=torch.uint8)[offset : offset + data.numel()]
    moved.copy_(data)
    assert checksum(moved, SEED) == checksum(data, SEED)
    assert torch.equal(moved, data), "the input is only read"


def test_bytes_in_no_one_order_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        checksum(torch.zeros(4, 6)[:, ::2], SEED)


def test_every_change_of_one_byte_is_seen() -> None:
    """All positions and all values of a small item; and every position of a larger one."""
    small = noise(24)
    seen = {checksum(small, SEED)}
    for at in range(24):
        old = int(small[at])
        for value in range(256):
            if value != old:
                small[at] = value
                seen.add(checksum(small, SEED))
        small[at] = old
    assert len(seen) == 1 + 24 * 255

    large, draw = noise(ROW * 2 + 9), random.Random(2)
    whole = checksum(large, SEED)
    for at in range(large.numel()):
        old = int(large[at])
        large[at] = old ^ draw.randrange(1, 256)
        assert checksum(large, SEED) != whole, at
        large[at] = old


def test_every_change_of_one_word_changes_both_halves() -> None:
    assert all(key % 2 for seed in range(20) for key in _keys(seed)[0].view(-1).tolist()), "what makes it certain"
    data, draw = noise(ROW * 3), random.Random(3)
    words = data.view(torch.int32)
    whole = checksum(data, SEED)
    for _ in range(1000):
        at = draw.randrange(words.numel())
        old = int(words[at])
        flipped = old + (1 << 31) if old < 0 else old - (1 << 31)
        new = draw.choice([flipped, -old - 1, draw.randrange(-(1 << 31), 1 << 31)])
        if new == old:
            continue
        words[at] = new
        changed = checksum(data, SEED)
        assert changed[:8] != whole[:8]
        assert changed[8:] != whole[8:]
        words[at] = old


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_exchanges_and_repetitions_are_seen(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([64, ROW, ROW + 64, 4 * ROW]))
    unit = data.draw(st.sampled_from([n for n in (1, 2, 4, 8, 64, ROW) if 2 * n <= size]))
    values = noise(size, data.draw(st.integers(0, 1000)))
    parts = list(values.split(unit))
    a, b = data.draw(st.lists(st.integers(0, size // unit - 1), min_size=2, max_size=2, unique=True))
    kind = data.draw(st.sampled_from(["exchange", "repeat", "rotate"]))
    if kind == "exchange":
        parts[a], parts[b] = parts[b], parts[a]
    elif kind == "repeat":
        parts[a] = parts[b]
    else:
        parts = parts[1:] + parts[:1]
    changed = torch.cat(parts)
    assert (checksum(changed, SEED) == checksum(values, SEED)) == torch.equal(changed, values)


def test_flipped_signs_are_seen() -> None:
    """Differences with many zero bits at the end, which a sum of plain products would let cancel."""
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    whole, draw = checksum(values, SEED), random.Random(7)
    for flips in (1, 2, 2, 2, 4, 8, 64, 8192):
        for _ in range(50):
            flat = values.clone().view(-1)
            at = draw.sample(range(flat.numel()), flips)
            flat[at] = -flat[at]
            assert checksum(flat, SEED) != whole
    assert checksum(-values, SEED) != whole
    rows = values.clone()
    rows[[1, 2]] = -rows[[1, 2]]
    assert checksum(rows, SEED) != whole


def test_changes_that_add_up_to_nothing_are_seen() -> None:
    values, draw = noise(ROW * 2).view(torch.int32), random.Random(9)
    whole = checksum(values, SEED)
    for _ in range(500):
        a, b = draw.sample(range(values.numel()), 2)
        by = draw.choice([1, 1 << 16, 1 << 30])
        changed = values.clone()
        changed[a] += by
        changed[b] -= by
        assert checksum(changed, SEED) != whole


def test_zeros_are_told_apart_by_their_number() -> None:
    sums = {checksum(torch.zeros(size, dtype=torch.uint8), SEED) for size in range(0, 3 * ROW, 61)}
    assert len(sums) == len(range(0, 3 * ROW, 61))


def test_the_seed_matters() -> None:
    data = noise(1000)
    assert len({checksum(data, seed) for seed in range(200)}) == 200
    assert checksum(data, MASK) != checksum(data, 0)


def test_speed_is_measured_beside_blake2b() -> None:
    rows = measure((1 << 16, 1 << 20))
    print(*rows, sep="\n")
    assert [row["bytes"] for row in rows] == [1 << 16, 1 << 20]
    assert all(row[name] > 0 for row in rows for name in ("checksum", "finite", "blake2b"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_is_seen_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    values = torch.randn(37, 129, generator=torch.Generator().manual_seed(6)).to(dtype)
    assert finite(values)
    for at in [(0, 0), (36, 128), (17, 64), (36, 0), (0, 128)]:
        spoiled = values.clone()
        spoiled[at] = bad
        assert not finite(spoiled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    assert finite(torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0], dtype=dtype))
    assert finite(torch.empty(0, 8, dtype=dtype))
    assert not finite(torch.full((2, 2), float("nan"), dtype=dtype))
