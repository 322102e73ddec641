"""The seconds that one pipeline stage's layers take, by rows and by context, from shapes and rates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vllm_suite.planner.hardware.collectives import Collectives, Kind
from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.models.shapes import Attention, Layer, Linear, Rows
from vllm_suite.planner.models.sharding import cache_share, counted, on_rank, vocab_rows
from vllm_suite.planner.sources.base import FloatArray
from vllm_suite.planner.sources.efficiency import Efficiency


@dataclass(frozen=True)
class AttentionCost:
    """Seconds of attention, summed over the layers of one kind on one rank.

    Attributes:
        per_pair: of a query-key pair of a prompt.
        per_cached: of a token before a prompt chunk: reading its cache, and for MLA unpacking it.
        per_key: of a key that a decoded token attends to.
        per_key_beside: the same in a step that has prompts too.
        window: longest distance that is attended to.
        sampled: prompts attend with their last token only.
    """

    per_pair: float
    per_cached: float
    per_key: float
    per_key_beside: float
    window: int | None
    sampled: bool


@dataclass(frozen=True)
class Work:
    """What the costs of a stage are made of."""

    model: Model
    quant: Quantization
    parallel: Parallel
    efficiency: Efficiency
    collectives: Collectives
    first_rank: int = 0

    @property
    def ranks(self) -> range:
        """The tensor-parallel group."""
        return range(self.first_rank, self.first_rank + self.parallel.tp)

    @property
    def expert_ranks(self) -> range:
        """The group that shares the experts."""
        return range(self.first_rank, self.first_rank + self.parallel.expert_ranks)

    def layers(self, layers: tuple[Layer, ...], over: Rows, rows: FloatArray) -> FloatArray:
        """Seconds of everything in these layers that runs over `over`, for each number of rows; 0 for no rows."""
        total = np.zeros_like(rows)
        busy = rows > 0
        some = rows[busy]
        if some.size == 0:
            return total
        for layer, count in counted(layers):
            total[busy] += count * self._layer(layer, over, some)
        return total

    def _layer(self, layer: Layer, over: Rows, rows: FloatArray) -> FloatArray:
        seconds = np.zeros_like(rows)
        own: Rows = "sampled" if layer.late else "tokens"
        for linear in layer.linears:
            if linear.rows == over:
                seconds += self._linear(linear, rows)
        if own == over and layer.attention is not None and layer.attention.heads:
            seconds += self._small(layer, rows) + self._exchange(layer, rows)
        return seconds

    def _linear(self, linear: Linear, rows: FloatArray) -> FloatArray:
        device, rank = self.collectives.cluster.device, on_rank(linear, self.parallel)
        each, met, per_matrix = rows, np.ones_like(rows), rows
        if linear.experts > 1:
            # Experts that any row reaches when each is sent at random: an upper bound, routers have preferences.
            everyone = rows * self.parallel.dp
            routed = everyone * linear.used
            met = rank.experts * (1.0 - (1.0 - linear.used / linear.experts) ** everyone)
            each = routed * rank.experts / linear.experts
            if self.parallel.ep:
                each = each * self.efficiency.imbalance
            per_matrix = np.maximum(1.0, each / met)
        flops = 2.0 * each * rank.inputs * rank.outputs
        weights = met * rank.inputs * rank.outputs * self.quant.of(linear).bits / 8
        moved = each * (rank.inputs + rank.outputs) * self.quant.activation_bytes
        peak = device.flops(self.quant.compute(linear))
        return self.efficiency.product(flops, per_matrix, weights + moved, peak, device.bandwidth)

    def _small(self, layer: Layer, rows: FloatArray) -> FloatArray:
        """Norms, rotary embedding, activation function: kernels that move rows and compute next to nothing."""
        attention, tp = layer.attention, self.parallel.tp
        assert attention is not None
        heads = attention.heads / tp * (attention.key + attention.value)
        wide = max((linear.used * on_rank(linear, self.parallel).outputs for linear in layer.linears), default=0)
        # Two norms over row and residual, rotary embedding and cache write over queries and keys, the activation. What
        # one kernel writes the next one partly finds in the cache, so each value is counted once and not twice.
        values = 4 * self.model.hidden + heads + wide
        size = rows * values * self.quant.activation_bytes
        # Two norms, rotary embedding, cache write, attention itself, activation function.
        return 6 * self.efficiency.kernel_us * 1e-6 + size / (self._bandwidth * self.efficiency.memory)

    def _exchange(self, layer: Layer, rows: FloatArray) -> FloatArray:
        size = self.model.hidden * self.quant.activation_bytes
        seconds = self._collective("all_reduce", rows, size, self.ranks)
        if layer.moe and self.parallel.dp > 1:
            # vLLM's default gathers every rank's rows before the experts and scatters the sums after them.
            everyone = size * self.parallel.dp
            seconds = seconds + self._collective("all_gather", rows, everyone, self.expert_ranks)
            return seconds + self._collective("reduce_scatter", rows, everyone, self.expert_ranks)
        return 2 * seconds

    def ends(self, first: bool, last: bool, tokens: FloatArray) -> FloatArray:
        """Seconds of what a stage does over tokens outside its layers: embedding, handing rows to the next stage."""
        size = self.model.hidden * self.quant.activation_bytes
        seconds = np.zeros_like(tokens)
        if first:
            seconds += self.efficiency.kernel_us * 1e-6 + self._collective("all_reduce", tokens, size, self.ranks)
        if not last:
            # Hidden states and residual.
            behind = self.first_rank + self.parallel.expert_ranks
            seconds += self._collective("p2p", tokens, 2 * size, range(self.first_rank, behind + 1))
        return np.where(tokens > 0, seconds, 0.0)

    def head(self, rows: FloatArray) -> FloatArray:
        """Seconds of the output head and the sampler, for each number of sequences."""
        if not self.model.head:
            return np.zeros_like(rows)
        vocab = vocab_rows(self.model, self.parallel.tp)
        some = np.maximum(rows, 1.0)
        device, base = self.collectives.cluster.device, self.quant.base_bytes
        size = vocab * self.model.hidden * base + some * (vocab + self.model.hidden) * base
        flops = 2.0 * some * vocab * self.model.hidden
        seconds = self.efficiency.product(flops, some, size, device.flops(self.quant.base), device.bandwidth)
        seconds = seconds + self._collective("all_gather", some, self.model.vocab * base, self.ranks)
        # The sampler reads float32 logits a few times.
        seconds = seconds + 4 * some * self.model.vocab * 4 / (device.bandwidth * self.efficiency.memory)
        return np.where(rows > 0, seconds, 0.0)

    def _collective(self, kind: Kind, rows: FloatArray, size: float, ranks: range) -> FloatArray:
        if len(ranks) < 2:
            return np.zeros_like(rows)
        # α–β is linear in the size, measured tables are near enough to it between powers of two.
        most = max(1.0, float(rows.max()))
        points = np.unique(np.concatenate([[1.0], 2.0 ** np.arange(0, np.log2(most), 1.0), [most]]))
        ask: Callable[[float], float] = lambda count: self.collectives.seconds(kind, count * size, ranks)  # noqa: E731
        return np.interp(rows, points, [ask(float(count)) for count in points])

    @property
    def _bandwidth(self) -> float:
        return self.collectives.cluster.device.bandwidth

    def attention(self, layers: tuple[Layer, ...]) -> tuple[AttentionCost, ...]:
        """Costs of the scores of these layers, one for each window and kind of rows."""
        found: dict[tuple[int | None, bool], tuple[float, float, float, float]] = {}
        for layer, count in counted(layers):
            if layer.attention is None or not layer.attention.heads:
                continue
            pair, cached, key = self._scores(layer.attention)
            # Kernels that take prompts and decoded tokens together may not pack the query heads of a KV head.
            further = 0 if layer.attention.latent else layer.attention.heads / layer.attention.kv_heads - 1
            beside = key * (1 + further * self.efficiency.reread)
            kind = (layer.attention.window, layer.late)
            old = found.get(kind, (0.0, 0.0, 0.0, 0.0))
            costs = (pair, cached, key, beside)
            found[kind] = tuple(total + count * each for total, each in zip(old, costs, strict=True))  # type: ignore[assignment]
        return tuple(AttentionCost(*costs, *kind) for kind, costs in found.items())

    def _scores(self, attention: Attention) -> tuple[float, float, float]:
        device, own = self.collectives.cluster.device, self.efficiency
        heads = attention.heads / self.parallel.tp
        rate = device.flops(self.quant.base)
        pair = 2.0 * heads * (attention.key + attention.value)
        # The width of a cached token is known even where another layer holds it.
        values = attention.latent + attention.rope or attention.kv_heads * (attention.key + attention.value)
        held = 1 if attention.latent else attention.kv_heads
        cached = self.quant.cache_bytes(values, held) * cache_share(attention, self.parallel.tp)
        read = cached / (device.bandwidth * own.decode_attention)
        key, unpack = pair, 0.0
        if attention.latent:
            key = 2.0 * heads * (2 * attention.latent + attention.rope)
            # A chunk after a prefix multiplies the prefix's compressed rows out again.
            wide = attention.key - attention.rope + attention.value
            unpack = 2.0 * attention.latent * heads * wide / (rate * own.matmul)
        return pair / (rate * own.prefill_attention), read + unpack, max(read, key / (rate * own.prefill_attention))
