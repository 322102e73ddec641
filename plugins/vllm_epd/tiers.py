"""One tier of the pool: a slab of memory divided into blocks, and which of them are free.

An item takes whole blocks, contiguous where there is such a hole, else several runs of them: fragmentation costs
descriptors, never capacity. Nothing here locks; the pool does.
"""

from __future__ import annotations

import bisect
from typing import Literal, NamedTuple

import torch

from vllm_epd.checksum import flat_bytes

Memory = Literal["DRAM", "VRAM"]


class Run(NamedTuple):
    """``blocks`` blocks from ``start`` on."""

    start: int
    blocks: int


class FreeRuns:
    """Free blocks of ``count``, as maximal runs in order of their start."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.free = count
        self._runs = [Run(0, count)] if count else []

    def take(self, blocks: int) -> tuple[Run, ...] | None:
        """``blocks`` blocks in as few runs as there are holes for: the smallest hole that holds all, else the
        largest holes first. None, and nothing taken, where too few are free."""
        if not 0 < blocks <= self.free:
            return None
        fitting = [run for run in self._runs if run.blocks >= blocks]
        holes = [min(fitting, key=lambda run: run.blocks)] if fitting else sorted(self._runs, key=lambda r: -r.blocks)
        taken: list[Run] = []
        for hole in holes:
            part = Run(hole.start, min(hole.blocks, blocks))
            at = bisect.bisect_left(self._runs, hole)
            rest = Run(part.start + part.blocks, hole.blocks - part.blocks)
            self._runs[at : at + 1] = [rest] if rest.blocks else []
            taken.append(part)
            blocks -= part.blocks
            self.free -= part.blocks
            if not blocks:
                break
        return tuple(sorted(taken))

    def give(self, runs: tuple[Run, ...]) -> None:
        """Take runs back; adjacent holes become one."""
        for run in runs:
            at = bisect.bisect_left(self._runs, run)
            start, end = run.start, run.start + run.blocks
            first = last = at
            if at and sum(self._runs[at - 1]) == start:
                first, start = at - 1, self._runs[at - 1].start
            if at < len(self._runs) and self._runs[at].start == end:
                last, end = at + 1, sum(self._runs[at])
            self._runs[first:last] = [Run(start, end - start)]
            self.free += run.blocks


class Tier:
    """A slab and its free blocks.

    Args:
        name: label value in metrics.
        slab: ``[bytes]`` uint8, contiguous, on a CPU or a GPU. A rest smaller than a block is not used.
    """

    def __init__(self, name: str, slab: torch.Tensor, block_bytes: int) -> None:
        self.name = name
        self.slab = slab
        self.block_bytes = block_bytes
        self.base = slab.data_ptr()
        on_cpu = slab.device.type == "cpu"
        self.memory: Memory = "DRAM" if on_cpu else "VRAM"
        self.device = 0 if on_cpu else slab.device.index or 0
        self.holes = FreeRuns(slab.numel() // block_bytes)

    @property
    def used_bytes(self) -> int:
        return (self.holes.count - self.holes.free) * self.block_bytes

    @property
    def capacity_bytes(self) -> int:
        return self.holes.count * self.block_bytes

    def blocks_for(self, size: int) -> int:
        """Blocks that ``size`` bytes take."""
        return -(-size // self.block_bytes)

    def pieces(self, runs: tuple[Run, ...], size: int) -> tuple[tuple[int, int], ...]:
        """Offset in the slab and bytes of each piece of an item of ``size`` bytes."""
        result = []
        for run in runs:
            part = min(run.blocks * self.block_bytes, size)
            result.append((run.start * self.block_bytes, part))
            size -= part
        return tuple(result)

    def write(self, pieces: tuple[tuple[int, int], ...], data: torch.Tensor) -> None:
        """Copy ``data``, ``[size]`` uint8 on any device, and wait until it is there."""
        done = 0
        for offset, part in pieces:
            self.slab[offset : offset + part].copy_(data[done : done + part], non_blocking=True)
            done += part
        # Copies between host and device are queued on the device's stream, whichever end the slab is.
        for device in {self.slab.device, data.device}:
            if device.type != "cpu":
                torch.cuda.current_stream(device).synchronize()

    def read(self, pieces: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """An item's bytes, ``[size]`` uint8 on the slab's device: a view where it is one piece, else a copy."""
        parts = [self.slab[offset : offset + part] for offset, part in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def new_slab(size: int, device: torch.device | str = "cpu", *, pinned: bool = False) -> torch.Tensor:
    """Memory for a tier, touched once so that no transfer meets a page for the first time."""
    return flat_bytes(torch.zeros(size, dtype=torch.uint8, device=device, pin_memory=pinned))
