"""Small pools and items for the tests of the pool."""

from __future__ import annotations

import torch

from vllm_epd.pool import Pool, Stored
from vllm_epd.tiers import new_slab
from vllm_suite.handoff import Refusal

BLOCK = 256
LEASE_S = 10.0


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(clock: Clock, blocks: int = 8, host_blocks: int = 0) -> Pool:
    host = new_slab(host_blocks * BLOCK) if host_blocks else None
    return Pool(new_slab(blocks * BLOCK), BLOCK, LEASE_S, clock, host)


def values(blocks: float = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An item that takes ``blocks`` blocks."""
    rows = max(1, int(blocks * BLOCK) // (8 * dtype.itemsize))
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def put(pool: Pool, identifier: str, blocks: float = 1, seed: int = 0) -> Stored:
    stored = pool.put(identifier, values(blocks, seed))
    assert isinstance(stored, Stored), stored
    return stored


def bytes_of(pool: Pool, stored: Stored) -> torch.Tensor:
    tier = next(tier for tier in pool._shelves.tiers if tier.name == stored.tier)
    return torch.cat([tier.slab[at : at + size] for at, size in stored.runs])


def claim(pool: Pool, identifier: str, hold_s: float = 5.0) -> int:
    number = pool.pin(identifier, hold_s)
    assert not isinstance(number, Refusal)
    return number
