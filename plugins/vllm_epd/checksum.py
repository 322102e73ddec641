"""What is computed over an item's values where it is made and where it arrives: a checksum, and whether all are finite.

The checksum is two keyed sums, computed by the same tensor operations on a CPU and on a GPU (integers modulo 2^64, so
the order of the sums does not matter). The bytes are read as rows of 1024 words of 32 bits. A row's sum is over
word times odd 64-bit key; rows are combined by the sum of a bijection of (row's sum, row's index).

* A change of one word changes both sums for certain: an odd number times a difference below 2^32 is not 0.
* Any other change that does not depend on the seed goes unseen with a probability of about 2^-32 in each sum, so 2^-64:
  exchanged words, rows or blocks, flipped signs and torn writes among them.

The seed is drawn anew for each publication and travels with the lease, never with the bytes. It is no signature:
who can write the producer's memory can also publish.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

CHECKSUM_BYTES = 16
_WORDS = 1024  # of 32 bits, in a row
_ROW_BYTES = 4 * _WORDS
# On a CPU, what is done at a time stays below the 32768 elements from which torch spreads an operation over threads: it
# also stays in the second-level cache, and threads that wait for each other cost a hundred times more than they save
# where other processes use the cores. A GPU wants few launches, and has little memory beside the engine's.
_CPU_ELEMENTS = 32767
_CPU_ROWS = _CPU_ELEMENTS // _WORDS
_GPU_ROWS = 2048
_MASK = (1 << 64) - 1


def checksum(data: torch.Tensor, seed: int) -> bytes:
    """Checksum of ``data``'s bytes in row-major order.

    Args:
        data: contiguous tensor of any shape and dtype, on any device. An empty one has a checksum too.
        seed: 0 <= seed < 2^64.

    Returns:
        `CHECKSUM_BYTES` bytes, the same on every device.
    """
    flat = flat_bytes(data)
    size = flat.numel()
    keys, extra = _keys(seed)
    keys = keys.to(flat.device)
    rows, rest = divmod(size, _ROW_BYTES)
    sums = torch.zeros(2, rows + (rest > 0), dtype=torch.int64, device=flat.device)
    _sum_rows(_words(flat[: rows * _ROW_BYTES]), keys, sums)
    if rest:
        last = torch.zeros(_ROW_BYTES, dtype=torch.uint8, device=flat.device)
        last[:rest] = flat[rows * _ROW_BYTES :]
        _sum_rows(_words(last), keys, sums[:, rows:])
    index = torch.arange(sums.shape[1], dtype=torch.int64, device=flat.device)
    places = torch.stack([index * _signed(step | 1) + _signed(start) for step, start, _ in extra])
    totals = _mixed(sums ^ places).sum(1).tolist()  # waits for the device
    # `end` is odd, so items of different sizes whose bytes differ by zeros at the end differ here.
    lanes = [(total + size * (end | 1)) & _MASK for total, (_, _, end) in zip(totals, extra, strict=True)]
    return b"".join(lane.to_bytes(8, "little") for lane in lanes)


def finite(values: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Waits for the device.

    ``torch.isfinite(values).all()`` says the same, at a tenth of the speed on a CPU.
    """
    if values.numel() == 0:
        return True
    flat = values.reshape(-1)
    parts = flat.split(_CPU_ELEMENTS if flat.device.type == "cpu" else flat.numel())
    extremes = [extreme for part in parts for extreme in torch.aminmax(part)]  # a NaN is both minimum and maximum
    return bool(torch.isfinite(torch.stack(extremes)).all())


def flat_bytes(data: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, ``[size]`` uint8, sharing its memory.

    Raises:
        ValueError: it is not contiguous.
    """
    if not data.is_contiguous():
        raise ValueError("the bytes of a tensor that is not contiguous have no one order")
    return data.reshape(-1).view(torch.uint8)


def _words(data: torch.Tensor) -> torch.Tensor:
    if data.storage_offset() % 4 or data.data_ptr() % 4:
        data = data.clone()
    return data.view(torch.int32).view(-1, _WORDS)


def _sum_rows(words: torch.Tensor, keys: torch.Tensor, out: torch.Tensor) -> None:
    """Set ``out[lane, row]`` = the row's keyed sum modulo 2^64."""
    on_cpu = words.device.type == "cpu"
    step = _CPU_ROWS if on_cpu else _GPU_ROWS
    for first in range(0, words.shape[0], step):
        wide = words[first : first + step].to(torch.int64)
        for lane in (0, 1):
            # Integer matrix products exist on CPUs only, where they read `wide` once.
            part = torch.mv(wide, keys[lane]) if on_cpu else (wide * keys[lane]).sum(1)
            out[lane, first : first + part.shape[0]] = part


def _keys(seed: int) -> tuple[torch.Tensor, list[tuple[int, int, int]]]:
    """Odd keys ``[2, words]``, and three numbers for each lane, all from ``seed``."""
    extra = 6 * 8
    stream = bytearray(hashlib.shake_128(b"suite-ec" + seed.to_bytes(8, "little")).digest(2 * 8 * _WORDS + extra))
    numbers = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, extra, 8)]
    keys = torch.frombuffer(stream, dtype=torch.int64, offset=extra).view(2, _WORDS) | 1
    return keys, [(numbers[0], numbers[1], numbers[2]), (numbers[3], numbers[4], numbers[5])]


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 64-bit integers that spreads every bit (the finish of splitmix64)."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts signed integers arithmetically


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def measure(sizes: tuple[int, ...] = (1 << 18, 1 << 20, 1 << 22, 1 << 24), device: str = "cpu") -> list[dict[str, Any]]:
    """Speed of `checksum` and `finite` beside blake2b over the same bytes, GB/s; best of several runs each."""
    import time

    def speed(size: int, run: Any) -> float:
        best = float("inf")
        for _ in range(7):
            begun = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begun)
        return round(size / best / 1e9, 2)

    rows = []
    for size in sizes:
        values = torch.randn(size // 2, device=device).to(torch.bfloat16)
        plain = flat_bytes(values).cpu().numpy()
        rows.append(
            {
                "bytes": size,
                "checksum": speed(size, lambda values=values: checksum(values, 1)),
                "finite": speed(size, lambda values=values: finite(values)),
                "blake2b": speed(size, lambda plain=plain: hashlib.blake2b(plain, digest_size=16).digest()),
            }
        )
    return rows


if __name__ == "__main__":
    for row in measure():
        print("  ".join(f"{name} {value}" for name, value in row.items()))
