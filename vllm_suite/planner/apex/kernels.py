"""What APEX's engine looks up: products, attention and collectives in microseconds, with its rounding."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from vllm_suite.planner.sources.aic_attention import Surface
from vllm_suite.planner.sources.aic_products import Products
from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import FloatArray, Outside, SourceError

FILES = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
         "all_to_all": "alltoall", "p2p": "sendrecv"}  # fmt: skip
"""Where APEX's profiles keep each collective."""


class Kernels(Protocol):
    """Compute times of a device in microseconds."""

    def product(self, outputs: int, inputs: int, tokens: int) -> float:
        """Of a product over so many tokens."""
        ...

    def attention(self, heads: int, head: int, batch: int, length: int) -> float:
        """Of causal attention of `heads` heads, each with keys of its own, over prompts of one length."""
        ...


class AicKernels:
    """AIConfigurator's tables in the place of APEX's own: 16-bit products, attention with a KV head for each head.

    APEX's profile has a row for 64 tokens and every multiple of 128; they are filled in linearly between measured ones.
    """

    def __init__(self, tables: AicTables) -> None:
        self.tables, self.products = tables, Products(tables, Outside())
        self._lines: dict[tuple[int, int], FloatArray] = {}
        self._surfaces: dict[tuple[int, int], Surface] = {}

    def product(self, outputs: int, inputs: int, tokens: int) -> float:
        """See `Kernels`."""
        if (outputs, inputs) not in self._lines:
            sizes = np.concatenate([[64.0], np.arange(128.0, 65_537.0, 128.0)])
            rows = self.products.measured_rows("bf16")
            known = self.products.seconds("bf16", rows, outputs, inputs) * 1e6
            self._lines[outputs, inputs] = np.interp(sizes, rows, known) * np.maximum(1.0, sizes / rows[-1])
        return float(self._lines[outputs, inputs][0 if tokens <= 64 else tokens // 128])

    def attention(self, heads: int, head: int, batch: int, length: int) -> float:
        """See `Kernels`."""
        if (heads, head) not in self._surfaces:
            where = {"kv_cache_dtype": "bfloat16", "head_dim": head, "window_size": 0, "num_heads": heads}
            where |= {"num_key_value_heads": heads}
            rows = self.tables.rows("attention", "context_attention_perf.parquet", ("batch_size", "isl"), where)
            if not len(rows):
                raise SourceError(f"{self.tables.system}: attention of {heads} heads of {head} was not measured")
            self._surfaces[heads, head] = Surface(rows)
        return self._surfaces[heads, head].at(batch, length)[0] * 1e6


@dataclass(frozen=True)
class Exchanges:
    """Times of collectives from a folder of APEX's profiles (`profile/comm/<gpu>` of microsoft/apex_plus).

    `lines` has, by kind, nodes and devices of a node, ascending sizes in KiB and microseconds, of 16-bit values.
    """

    lines: Mapping[tuple[str, int, int], tuple[FloatArray, FloatArray]]

    @classmethod
    def read(cls, folder: Path) -> Exchanges:
        """Raises SourceError where a file is missing or has other columns."""
        found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        for kind, name in FILES.items():
            path = folder / f"{name}.csv"
            try:
                with path.open(newline="", encoding="utf-8") as file:
                    for row in csv.DictReader(file):
                        if row["dtype"] == "half":
                            key = (kind, int(row["num_nodes"]), int(row["num_gpus_per_node"]))
                            found.setdefault(key, []).append((float(row["size(kb)"]), float(row["time(us)"])))
            except OSError as error:
                raise SourceError(f"{path}: {error.strerror}; it is in microsoft/apex_plus") from error
            except (KeyError, TypeError, ValueError) as error:
                raise SourceError(f"{path}: not one of APEX's profiles: {error!r}") from error
        return cls({key: _columns(sorted(rows)) for key, rows in found.items()})

    def microseconds(self, kind: str, devices: int, per_node: int, values: float) -> float:
        """Of a collective over 16-bit values, in nodes of `per_node` devices.

        Raises:
            SourceError: that many devices were not measured.
        """
        if devices == 1:
            return 0.0
        nodes, inside = (1, devices) if devices < per_node else (devices // per_node, per_node)
        return self._look_up(kind, nodes, inside, values)

    def hand_over(self, values: float, *, in_node: bool) -> float:
        """Microseconds of a message of 16-bit values to the next pipeline stage."""
        return self._look_up("p2p", 1, 2, values) if in_node else self._look_up("p2p", 2, 1, values)

    def _look_up(self, kind: str, nodes: int, inside: int, values: float) -> float:
        """Linear in the size in whole KiB; beyond the table in proportion to its end."""
        line = self.lines.get((kind, nodes, inside))
        if line is None:
            raise SourceError(f"{kind} over {nodes} x {inside} devices was not measured")
        sizes, times = line
        size = float(int(values * 2) // 1024)
        return float(np.interp(size, sizes, times)) * max(1.0, size / float(sizes[-1]))


def _columns(rows: list[tuple[float, float]]) -> tuple[FloatArray, FloatArray]:
    table = np.array(rows)
    return table[:, 0], table[:, 1]


def rounded(tokens: int) -> int:
    """Tokens as APEX looks products up: 64 at least, above them in steps of 128."""
    return 64 if tokens <= 64 else -(-tokens // 128) * 128


def attention_length(mean: float) -> int:
    """A length as APEX looks attention up: in steps of 16."""
    return int((mean + 15) // 16 * 16)


@lru_cache(maxsize=8)
def exchanges(folder: Path) -> Exchanges:
    """`Exchanges.read`, once for each folder."""
    return Exchanges.read(folder)
