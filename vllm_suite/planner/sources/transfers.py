"""Handing over between instances: KV blocks from prefill to decode, encoder output from encode to prefill."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.hardware.collectives import BUSY
from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.models.memory import kv_bytes

SETUP_S = 1e-3
"""What a pull costs before its first byte: notification, descriptors, one round trip."""


@dataclass(frozen=True)
class Transfers:
    """Seconds of hand-overs on one cluster; every accelerator pulls or is read over its own share of the link."""

    cluster: Cluster
    setup: float = SETUP_S

    def seconds(self, size: float, source: range, target: range) -> float:
        """Time of `size` bytes that the smaller of the two groups moves side by side."""
        return self._over(size / min(len(source), len(target)), source[0], target[0])

    def kv(
        self,
        model: Model,
        quant: Quantization,
        tokens: int,
        *,
        source: Parallel,
        target: Parallel,
        source_rank: int,
        target_rank: int,
        block: int = 16,
    ) -> float:
        """Time of the cache of one sequence.

        Each rank of the target pulls what it holds. A rank of the source is read by all that need its share: with fewer
        ranks there than at the target it serves several, and MLA's compressed rows are read once by each.

        Args:
            tokens: of the sequence.
            source, target: how the two instances are cut.
            source_rank, target_rank: their first accelerators.
        """
        held = [kv_bytes(model, quant, target, tokens, stage=stage, block=block) for stage in range(target.pp)]
        read = target.tp * sum(held) / (source.tp * source.pp)
        return self._over(max(*held, read), source_rank, target_rank)

    def _over(self, size: float, source: int, target: int) -> float:
        link = self.cluster.link((source, target))
        return self.setup + link.latency_us * 1e-6 + size / (link.gb_s * 1e9 * BUSY)
