"""The settings of an engine that its scheduler follows, by vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_suite.planner.simulator.jobs import SimulationError


@dataclass(frozen=True)
class Limits:
    """An engine's settings; of one rank where it has several data-parallel ones.

    Attributes:
        blocks: of the cache; what vLLM logs as the number of GPU blocks less one, which it keeps for itself.
        reserve_full_isl: `scheduler_reserve_full_isl`: whether the whole sequence has to fit for admission, or only the
            first chunk.
        async_scheduling: a step is decided on while the one before it computes, as vLLM does by default on GPUs.
        by_length: requests end at a length that the engine was told (`max_tokens` with `ignore_eos`, as benchmarks do
            it), not by a token that it has to see. It matters to scheduling ahead alone, which otherwise computes one
            token too many for each request.
        prefix_caching: `enable_prefix_caching`: blocks are found again by their contents.
    """

    blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    reserve_full_isl: bool = True
    async_scheduling: bool = False
    by_length: bool = False
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        if min(self.blocks, self.block_size, self.max_num_seqs) < 1:
            raise SimulationError(f"{self}: blocks, block_size and max_num_seqs have to be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise SimulationError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is less than max_num_seqs {self.max_num_seqs};"
                " vLLM refuses that"
            )
