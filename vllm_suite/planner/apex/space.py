"""APEX's plan space: whole-model replicas, pipeline stages, and for each cell of a block replicas of its own.

A cell is the attention or the feed-forward network of a block (Algorithm 1 of the paper, and microsoft/apex_plus). Each
is cut over the devices of one of its replicas; replicas of one cell share a stage with those of another, so attention
may be data-parallel beside a feed-forward network that is tensor-parallel. What moves between them is in `exchange`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, gcd

from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.models.shapes import ModelError
from vllm_suite.planner.plan import Plan, PoolPlan


@dataclass(frozen=True)
class Block:
    """A decoder block as APEX describes it: one attention cell, one feed-forward cell.

    Attributes:
        heads, kv_heads, head: query heads, heads of the cache, their width.
        hidden, inner: widths of a token and inside the feed-forward network.
        matrices: of the feed-forward network, 3 with a gate and 2 without.
        experts, used: 1 and 1 for a dense one.
        layers: blocks of the model.
        weight_bytes, cache_bytes: of one value.
    """

    heads: int
    kv_heads: int
    head: int
    hidden: int
    inner: int
    matrices: int
    experts: int
    used: int
    layers: int
    weight_bytes: float
    cache_bytes: float

    @classmethod
    def of(cls, model: Model, quant: Quantization) -> Block:
        """Of a model whose layers are all alike.

        Raises:
            ModelError: layers differ, or have shared experts or latent attention, which APEX cannot describe.
        """
        kinds = {(layer.linears, layer.attention) for layer in model.layers}
        layer = model.layers[0]
        names = {linear.name: linear for linear in layer.linears}
        attention = layer.attention
        if len(kinds) != 1 or attention is None or attention.latent or "shared_down" in names:
            raise ModelError(f"{model.name}: APEX describes models of one kind of block, without shared experts or MLA")
        down = names["experts_down" if layer.moe else "down_proj"]
        return cls(
            attention.heads,
            attention.kv_heads,
            attention.key,
            model.hidden,
            down.inputs,
            2 if "up_proj" in names else 3,
            down.experts,
            down.used,
            len(model.layers),
            quant.of(down).bits / 8,
            quant.cache_bytes(1, 0),
        )

    def attention_bytes(self, devices: int) -> float:
        """Weights of one attention cell on the first of its devices."""
        queries, keys = self.heads_on(devices)
        return 2.0 * (queries + keys) * self.head * self.hidden * self.weight_bytes

    def heads_on(self, devices: int) -> tuple[int, int]:
        """Query and KV heads of the first of `devices`: whole KV heads with their query heads, or a share of one."""
        if self.kv_heads >= devices:
            keys = ceil(self.kv_heads / devices)
            return keys * self.heads // self.kv_heads, keys
        return ceil(self.heads // self.kv_heads / ceil(devices / self.kv_heads)), 1

    def feed_forward_bytes(self, devices: int, whole_experts: bool) -> float:
        """Weights of one feed-forward cell on the first of its devices."""
        experts = ceil(self.experts / devices) if whole_experts else self.experts
        filters = self.inner if whole_experts else ceil(self.inner / devices)
        return self.matrices * experts * filters * self.hidden * self.weight_bytes


@dataclass(frozen=True)
class Scheme:
    """One plan of APEX.

    Attributes:
        replicas: of the whole model.
        stages: of each replica's pipeline.
        attention: replicas of the attention cell in a stage, and devices of each.
        feed_forward: the same of the feed-forward cell.
        whole_experts: experts stay whole on their devices.
    """

    replicas: int
    stages: int
    attention: tuple[int, int]
    feed_forward: tuple[int, int]
    whole_experts: bool = False

    @property
    def devices(self) -> int:
        """Of one stage."""
        return self.attention[0] * self.attention[1]

    @property
    def name(self) -> str:
        """For example ``2 x (2 stages, attention 2 x tp2, feed-forward 1 x tp4)``."""
        cut = "ep" if self.whole_experts else "tp"
        return (
            f"{self.replicas} x ({self.stages} stages, attention {self.attention[0]} x tp{self.attention[1]},"
            f" feed-forward {self.feed_forward[0]} x {cut}{self.feed_forward[1]})"
        )

    def plan(self, block: Block) -> Plan | None:
        """The same as engines that vLLM can start; None where it cannot.

        It cuts a dense model's cells alike, so both have one replica. With experts attention may be data-parallel
        inside an engine, beside experts cut or spread over all its devices.
        """
        (copies, tp), (fed, _) = self.attention, self.feed_forward
        if fed > 1 or (copies > 1 and block.experts == 1):
            return None
        return Plan((PoolPlan("any", self.replicas, Parallel(tp, self.stages, copies, self.whole_experts)),))

    def weight_bytes(self, block: Block) -> float:
        """Of the device that holds most."""
        cells = block.attention_bytes(self.attention[1])
        cells += block.feed_forward_bytes(self.feed_forward[1], self.whole_experts)
        return cells * (block.layers // self.stages)


@dataclass(frozen=True)
class Exchange:
    """A collective over `devices` between two cells; `factor` scales the tokens that it moves."""

    kind: str
    devices: int
    factor: float = 1.0


def exchange(block: Block, scheme: Scheme) -> tuple[tuple[Exchange, ...], tuple[Exchange, ...]]:
    """What follows the attention cell, and what follows the feed-forward cell, in every block."""
    from_attention = _after(scheme.attention, scheme.feed_forward, gated=False)
    (first, devices), (second, _) = scheme.feed_forward, scheme.attention
    if not scheme.whole_experts:
        return from_attention, _after(scheme.feed_forward, scheme.attention, block.matrices == 3 and block.experts == 1)
    # Experts receive their tokens by all-to-all and return them the same way.
    targets = scheme.attention[1] * scheme.attention[0] // scheme.feed_forward[0]
    sent = min(float(block.used), float(targets))
    into = (Exchange("reduce_scatter", scheme.attention[1]), Exchange("all_to_all", targets, sent))
    back, gathered = min(float(block.used), float(devices)), devices * first // second
    return into, (Exchange("all_to_all", devices, back), Exchange("all_gather", gathered, 1.0 / back))


def _after(cell: tuple[int, int], following: tuple[int, int], gated: bool) -> tuple[Exchange, ...]:
    (replicas, devices), (others, _) = cell, following
    gathered = Exchange("all_gather", devices * replicas // others)
    if gated:
        # APEX reduces between the second and the third matrix and gathers behind the cell.
        reduced = Exchange("all_reduce", devices)
        return (reduced, Exchange("all_to_all", devices), gathered) if others > replicas else (reduced, gathered)
    if replicas == others:
        return (Exchange("all_reduce", devices),)
    return Exchange("reduce_scatter", devices), gathered


def schemes(block: Block, cluster: Cluster) -> Iterator[Scheme]:
    """Every scheme of a cluster, in APEX's order; for Llama-3-70B on 8 x H100 there are 26.

    Kept are those whose cell replicas have no common divisor (else whole replicas would be meant), divide each other,
    can be partitioned evenly over nodes and fit their weights into memory.
    """
    for replicas in _divisors(cluster.gpus):
        for stages in _divisors(cluster.gpus // replicas):
            parts, devices = replicas * stages, cluster.gpus // replicas // stages
            if block.layers % stages or not _even(cluster, replicas) or not _even(cluster, parts):
                continue
            cells = [(each, devices // each) for each in _divisors(devices) if _even(cluster, parts * each)]
            attention = [cell for cell in cells if cell[1] <= block.heads]
            feed_forward = [(cell, False) for cell in cells if cell[1] <= block.inner]
            if block.experts > 1:
                feed_forward += [(cell, True) for cell in cells if 1 < cell[1] <= block.experts]
            for (cell, whole), heads in product(feed_forward, attention):
                if gcd(heads[0], cell[0]) != 1 or (heads[0] % cell[0] and cell[0] % heads[0]):
                    continue
                scheme = Scheme(replicas, stages, heads, cell, whole)
                if scheme.weight_bytes(block) <= cluster.device.memory_gib * 2**30:
                    yield scheme


def _even(cluster: Cluster, parts: int) -> bool:
    """Whether so many parts, a divisor of the devices, are whole nodes or equal shares of each.

    Without NVLink a node is a tree of pairs, so its shares are halves of halves.
    """
    if parts <= cluster.nodes:
        return cluster.nodes % parts == 0
    inside = parts // cluster.nodes
    return parts % cluster.nodes == 0 and (cluster.device.node.nvlink is not None or inside & (inside - 1) == 0)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
