"""Time of collectives and transfers on a cluster: α–β for each link, or measured tables."""

from __future__ import annotations

import csv
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, log2
from pathlib import Path
from typing import Literal

from vllm_suite.planner.hardware.device import Cluster, HardwareError, Link

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p"]
KINDS: tuple[Kind, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "p2p")
BUSY = 0.7
"""Share of a link's rate that large messages reach: APEX's NCCL measurements on 8 x H100 reach 0.64 to 0.87 of it."""


@dataclass(frozen=True)
class CollectiveTable:
    """Measured times of one collective: for a number of ranks ascending sizes in bytes and seconds."""

    rows: Mapping[int, tuple[tuple[float, ...], tuple[float, ...]]]

    @classmethod
    def read(cls, path: Path, nodes: int = 1) -> CollectiveTable:
        """A CSV with ``num_nodes, num_gpus_per_node, size(kb), time(us)``, as APEX writes them; others are ignored.

        Raises:
            HardwareError: a column is missing, or there are no rows for that number of nodes.
        """
        found: dict[int, dict[float, float]] = {}
        with path.open(newline="", encoding="utf-8") as file:
            for line, row in enumerate(csv.DictReader(file), 2):
                try:
                    if int(row["num_nodes"]) != nodes:
                        continue
                    sizes = found.setdefault(nodes * int(row["num_gpus_per_node"]), {})
                    sizes[float(row["size(kb)"]) * 1024] = float(row["time(us)"]) * 1e-6
                except (KeyError, ValueError, TypeError) as error:
                    raise HardwareError(f"{path}:{line}: {error!r} in a row of a collective") from error
        if not found:
            raise HardwareError(f"{path}: no rows for {nodes} nodes")
        return cls({n: (tuple(sorted(rows)), tuple(rows[k] for k in sorted(rows))) for n, rows in found.items()})

    def seconds(self, ranks: int, size: float) -> float | None:
        """Linear between the measured sizes; None outside them, or where that number of ranks was not measured."""
        if ranks not in self.rows:
            return None
        sizes, times = self.rows[ranks]
        if not sizes[0] <= size <= sizes[-1]:
            return None
        at = max(1, bisect_left(sizes, size))
        share = (size - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])


@dataclass
class Collectives:
    """Seconds of collectives over the first `ranks` accelerators of a cluster, or over any group of them.

    Where a table covers a query it answers; else α–β does, and `estimated` counts it where there is a table at all.
    """

    cluster: Cluster
    tables: Mapping[Kind, CollectiveTable] = field(default_factory=dict)
    busy: float = BUSY
    estimated: int = 0

    def seconds(self, kind: Kind, size: float, ranks: range) -> float:
        """Time of one collective.

        Args:
            size: bytes of the whole vector for all-reduce, all-gather (the result) and reduce-scatter (the input), of
                what one rank sends to all others for all-to-all, of the message for p2p.
            ranks: the group; one rank takes no time.
        """
        count = len(ranks)
        if count <= 1 or size <= 0:
            return 0.0
        table = self.tables.get(kind)
        if table is not None:
            found = table.seconds(count, size)
            if found is not None:
                return found
            self.estimated += 1
        per_node, link = self._in_one_node(ranks), self.cluster.link(ranks)
        # An NVLink domain may be wider than a node.
        if per_node == count or kind == "p2p" or link == self.cluster.device.node.nvlink:
            return self._flat(kind, size, count, link)
        return self._over_nodes(kind, size, count, per_node, ranks)

    def _flat(self, kind: Kind, size: float, count: int, link: Link) -> float:
        rate = link.gb_s * 1e9 * self.busy
        if kind == "p2p":
            return link.latency_us * 1e-6 + size / rate
        # A ring passes (n-1)/n of the vector once, for an all-reduce twice; latency grows with the depth of a tree.
        passes = 2 if kind == "all_reduce" else 1
        return passes * (link.latency_us * 1e-6 * ceil(log2(count)) + (count - 1) / count * size / rate)

    def _over_nodes(self, kind: Kind, size: float, count: int, per_node: int, ranks: range) -> float:
        nodes = ceil(count / per_node)
        inner, outer = self.cluster.link(ranks[:per_node]), self.cluster.network
        if kind == "all_to_all":
            # What stays in the node and what leaves it travel at the same time.
            near = self._flat(kind, size * per_node / count, per_node, inner) if per_node > 1 else 0.0
            leaving = size * (count - per_node) / count
            return max(near, outer.latency_us * 1e-6 * ceil(log2(nodes)) + leaving / (outer.gb_s * 1e9 * self.busy))
        around = self._flat("all_gather", size, per_node, inner) if per_node > 1 else 0.0
        across = self._flat(kind, size / per_node, nodes, outer)
        return (2 if kind == "all_reduce" else 1) * around + across

    def _in_one_node(self, ranks: range) -> int:
        size = self.cluster.device.node.gpus
        found: dict[int, int] = {}
        for rank in ranks:
            found[rank // size] = found.get(rank // size, 0) + 1
        return max(found.values())
