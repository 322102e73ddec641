"""Matrix products, experts and collectives out of AIConfigurator's tables, as times over numbers of rows."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import FloatArray, Outside, SourceError

GEMM_TYPES = {"bf16": "bfloat16", "fp16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block"}
MOE_TYPES = GEMM_TYPES | {"int4": "int4_wo", "mxfp4": "w4a16_mxfp4"}
"""What the tables call the planner's formats."""

AllReduce = Literal["graph", "eager", "nccl"]
"""vLLM's own all-reduce inside a CUDA graph or launched alone, or NCCL's."""


class Products:
    """Seconds of products by rows. Between measured widths the time over the roofline's time is interpolated."""

    def __init__(self, tables: AicTables, outside: Outside) -> None:
        self.tables, self.outside = tables, outside
        self._grids: dict[str, tuple[FloatArray, FloatArray, dict[tuple[float, float], FloatArray]]] = {}

    def _grid(self, kind: str) -> tuple[FloatArray, FloatArray, dict[tuple[float, float], FloatArray]]:
        if kind not in self._grids:
            rows = self.tables.rows("gemm", "gemm_perf.parquet", ("n", "k", "m"), {"gemm_dtype": kind})
            if not len(rows):
                raise SourceError(f"{self.tables.system}: no products in {kind} were measured")
            edges = np.flatnonzero(np.any(np.diff(rows[:, :2], axis=0) != 0, axis=1)) + 1
            lines = {(float(part[0, 0]), float(part[0, 1])): part[:, 2:] for part in np.split(rows, edges)}
            self._grids[kind] = (np.unique(rows[:, 0]), np.unique(rows[:, 1]), lines)
        return self._grids[kind]

    def measured_rows(self, weights: str) -> FloatArray:
        """The numbers of rows that products of a format were measured at, ascending."""
        lines = self._grid(GEMM_TYPES[weights])[2]
        return np.unique(np.concatenate([line[:, 0] for line in lines.values()]))

    def _ideal(self, kind: str, rows: FloatArray, outputs: float, inputs: float) -> FloatArray:
        size = 2.0 if kind == "bfloat16" else 1.0
        peak = self.tables.peak_flops["bfloat16" if kind == "bfloat16" else "fp8"]
        moved = (inputs * outputs + rows * inputs) * size + rows * outputs * 2.0
        bandwidth = self.tables.memory_bytes_s
        return np.maximum(2.0 * rows * inputs * outputs / peak, moved / bandwidth) + self.tables.launch_s

    def seconds(self, weights: str, rows: FloatArray, outputs: int, inputs: int) -> FloatArray:
        """Of one product of `rows` x `inputs` with `inputs` x `outputs`.

        Args:
            weights: the planner's name of the format.

        Raises:
            SourceError: the format was not measured.
        """
        kind = GEMM_TYPES.get(weights)
        if kind is None:
            raise SourceError(f"aic: products with {weights} weights were not measured; {', '.join(GEMM_TYPES)} were")
        wide, deep, lines = self._grid(kind)
        self.outside.clamp("product width", max(outputs, wide[0]), wide[0], wide[-1])
        self.outside.clamp("product depth", max(inputs, deep[0]), deep[0], deep[-1])
        ratio = np.zeros_like(rows)
        for output, share in _between(wide, outputs):
            for depth, part in _between(deep, inputs):
                line = lines.get((output, depth))
                if line is None:
                    raise SourceError(f"{self.tables.system}: {output:g} x {depth:g} in {kind} was not measured")
                ideal = self._ideal(kind, line[:, 0], output, depth)
                ratio += share * part * np.interp(rows, line[:, 0], line[:, 1] / ideal)
        return ratio * self._ideal(kind, rows, outputs, inputs)

    def experts(
        self,
        weights: str,
        tokens: FloatArray,
        *,
        hidden: int,
        inner: int,
        used: int,
        experts: int,
        slices: int,
        spread: int,
        distribution: str,
    ) -> FloatArray:
        """Of one layer's experts on the busiest of `slices` x `spread` ranks, for the tokens of all ranks.

        Raises:
            SourceError: this mixture was not measured so cut.
        """
        kind = MOE_TYPES.get(weights)
        where = {"moe_dtype": kind, "hidden_size": hidden, "inter_size": inner, "topk": used, "num_experts": experts}
        where |= {"moe_tp_size": slices, "moe_ep_size": spread}
        found = self.tables.rows("moe", "moe_perf.parquet", ("num_tokens",), where | {"distribution": distribution})
        if not len(found):
            raise SourceError(
                f"{self.tables.system}: experts {experts} of {hidden} x {inner}, {used} used, {weights}, cut {slices}"
                f" ways and spread over {spread} ranks ({distribution}) were not measured"
            )
        times, most = found[:, 1], found[-1, 0]
        # Beyond the largest number of tokens the products are compute-bound: time in proportion.
        self.outside.clamp("expert tokens", float(tokens.max()), 0, most)
        seconds: FloatArray = np.interp(tokens, found[:, 0], times) * np.maximum(1.0, tokens / most)
        return seconds

    def collective(self, kind: str, size: FloatArray, ranks: int, all_reduce: AllReduce) -> FloatArray:
        """Of one collective of `size` bytes over ranks of one node.

        Raises:
            SourceError: that many ranks were not measured.
        """
        if ranks == 1:
            return np.zeros_like(size)
        own = kind == "all_reduce" and all_reduce != "nccl"
        if own:
            where = {"num_gpus": ranks, "backend": f"{self.tables.framework}_{all_reduce}"}
            found = self.tables.rows("comm", "custom_allreduce_perf.parquet", ("message_size",), where)
        else:
            where = {"num_gpus": ranks, "op_name": kind.replace("all_to_all", "alltoall"), "nccl_dtype": "half"}
            found = self.tables.rows("comm", "nccl_perf.parquet", ("message_size",), where, maker="nccl")
        if not len(found):
            raise SourceError(f"{self.tables.system}: {kind} over {ranks} ranks of one node was not measured")
        sizes = 2.0 * found[:, 0]  # The tables count values of two bytes.
        seconds: FloatArray = np.interp(size, sizes, found[:, 1]) * np.maximum(1.0, size / sizes[-1])
        return seconds


def _between(points: FloatArray, value: float) -> list[tuple[float, float]]:
    """The measured neighbours of a value and their shares, by its logarithm; the edge alone beyond it."""
    at = int(np.searchsorted(points, value))
    if at == 0 or at == len(points) or points[at] == value:
        return [(float(points[min(at, len(points) - 1)]), 1.0)]
    low, high = float(points[at - 1]), float(points[at])
    share = float(np.log(value / low) / np.log(high / low))
    return [(low, 1.0 - share), (high, share)]
