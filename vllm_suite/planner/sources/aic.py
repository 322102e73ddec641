"""`aic`: step times from the kernels that AIConfigurator measured on the device, for any model of known shapes.

Which kernels a step runs, and what the small ones between them cost, follows AIConfigurator's own description of a
decoder (aiconfigurator-core 0.12.0, Apache-2.0): products, attention, all-reduce and experts from its tables; norms and
activations by the bytes they move. Host time is not in the tables: it is given, or fitted by a calibration.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from vllm_suite.media.tokens import ImageCost
from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.models.shapes import Attention, Layer
from vllm_suite.planner.models.sharding import check, counted, on_rank, vocab_rows
from vllm_suite.planner.sources.aic_attention import AttentionTimes, Kernel
from vllm_suite.planner.sources.aic_encoder import AicEncoder
from vllm_suite.planner.sources.aic_products import GEMM_TYPES, AllReduce, Products
from vllm_suite.planner.sources.aic_tables import AicTables, package_version
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, SourceError, Uncertainty, as_arrays
from vllm_suite.planner.sources.steps import DecodeLine, Steps

BARE = Uncertainty(0.25, "kernel times alone: measured engines take a nearly constant time more for each step")
WITH_HOST = Uncertainty(0.08, "kernel times and a fitted host time; other rows of the measurements it was fitted on")
EXPERT_TOKENS = 16_384
"""The most tokens, of all ranks together, that mixtures of experts were measured with."""

_LATENT = frozenset({"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj", "o_proj"})


class AicSource(LatencySource):
    """Step times of a model on a plan.

    Work over tokens is tabulated once for every number up to `max_tokens`, attention is looked up by chunks and mean
    context. Experts are those of the tables' `distribution`. The sampler and the gathering of logits are not in it, as
    in AIConfigurator. Pipeline stages share a step evenly.

    Attributes:
        request_s: seconds of a request outside its steps, for whoever adds it to its first token; in no step.
    """

    def __init__(
        self,
        model: Model,
        quant: Quantization,
        parallel: Parallel,
        tables: AicTables,
        *,
        step_us: float = 0.0,
        sequence_us: float = 0.0,
        request_us: float = 0.0,
        all_reduce: AllReduce = "graph",
        prompt_all_reduce: AllReduce | None = None,
        distribution: Literal["balanced", "power_law_1.01", "power_law_1.2"] = "power_law_1.2",
        max_tokens: int = 16_384,
        outside: Outside | None = None,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        """Read what the plan needs.

        Args:
            step_us, sequence_us: host time of each step and of each of its sequences that the device waits for.
            request_us: see `request_s`.
            all_reduce: how decode steps reduce; `prompt_all_reduce` is for steps with prompts, None for the same.

        Raises:
            SourceError: a kernel of the model was not measured; the text names it. ModelError: see `sharding.check`.
        """
        check(model, parallel)
        if any(layer.late for layer in model.layers):
            raise SourceError(f"{model.name}: AIConfigurator knows no SwiftKV layers")
        version = package_version()
        tables = replace(tables, versions={})  # What this source reads is noted for it alone.
        self.name = f"aic {model.name} on {tables.system}, {tables.framework} {tables.version}, core {version}"
        self.stages, self.outside = parallel.pp, outside or Outside()
        self.uncertainty = uncertainty or (WITH_HOST if step_us else BARE)
        self.model, self.quant, self.parallel, self.tables = model, quant, parallel, tables
        if model.moe:
            max_tokens = min(max_tokens, EXPERT_TOKENS // parallel.dp)
        self.request_s, self.max_tokens, self.distribution = request_us * 1e-6, max_tokens, distribution
        self.step_s, self.sequence_s = step_us * 1e-6, sequence_us * 1e-6
        self.products = Products(tables, self.outside)
        tokens = np.arange(1, max_tokens + 1, dtype=float)
        shared = self._tokens(tokens)
        small = sum(count * self._around(layer) for layer, count in counted(model.layers))
        decode = shared + self._exchange(tokens, all_reduce)
        prompt = shared + small + self._exchange(tokens, prompt_all_reduce or all_reduce)
        self._decode_rows, self._prompt_rows = (np.concatenate([[0.0], each]) for each in (decode, prompt))
        # Plain lists answer a single query an order of magnitude faster than arrays.
        self._decode_list, self._prompt_list = self._decode_rows.tolist(), self._prompt_rows.tolist()
        head = self.products.seconds(quant.base, tokens, vocab_rows(model, parallel.tp), model.hidden)
        self._head = np.concatenate([[0.0], head if model.head else np.zeros_like(head)])
        self._head_list: list[float] = self._head.tolist()
        self._attention = self._kernels()
        self._encoder: AicEncoder | None = None

    def _kernels(self) -> tuple[tuple[int, AttentionTimes], ...]:
        found: dict[Kernel, int] = {}
        for layer, count in counted(self.model.layers):
            if layer.attention is not None and layer.attention.heads:
                kernel = self._kernel(layer.attention, layer)
                found[kernel] = found.get(kernel, 0) + count
        return tuple((count, AttentionTimes(self.tables, each, self.outside)) for each, count in found.items())

    def _kernel(self, attention: Attention, layer: Layer) -> Kernel:
        heads, tp = attention.heads // self.parallel.tp, self.parallel.tp
        if attention.latent:
            if (attention.latent, attention.rope, self.model.hidden) != (512, 64, 7168):
                raise SourceError(f"{self.model.name}: latent attention was measured with DeepSeek-V3's widths alone")
            weights = GEMM_TYPES.get(self.quant.weights if self.quant.only == "linears" else self.quant.base)
            return Kernel(heads, 1, attention.latent, None, self.quant.kv, weights or "bfloat16")
        if attention.key != attention.value:
            raise SourceError(f"{self.model.name}: attention with keys and values of different widths was not measured")
        return Kernel(heads, max(1, attention.kv_heads // tp), attention.key, attention.window, self.quant.kv)

    def _tokens(self, tokens: FloatArray) -> FloatArray:
        """Seconds of products, experts and small kernels over tokens, all layers, without attention or all-reduce."""
        tables, hidden = self.tables, self.model.hidden
        total = tables.small(tokens * hidden * 2.0 * 2)  # The embedding.
        for layer, count in counted(self.model.layers):
            # Two norms with the residual: both are read and written.
            seconds = 2.0 * tables.small(tokens * 4 * hidden * 2.0)
            latent = layer.attention is not None and layer.attention.latent
            for linear in layer.linears:
                if linear.experts > 1 or (latent and linear.name in _LATENT):
                    continue
                rank = on_rank(linear, self.parallel)
                kind = self.quant.weights if self.quant.of(linear).bits < 16 else self.quant.base
                seconds = seconds + self.products.seconds(kind, tokens, rank.outputs, rank.inputs)
                if "gate_up" in linear.name:
                    seconds = seconds + tables.small(tokens * 1.5 * rank.outputs * 2.0)
            if layer.moe:
                seconds = seconds + self._experts(layer, tokens)
            total = total + count * seconds
        return np.asarray(total, dtype=float)

    def _experts(self, layer: Layer, tokens: FloatArray) -> FloatArray:
        linear = next(each for each in layer.linears if each.name == "experts_down")
        ranks, everyone = self.parallel.expert_ranks, tokens * self.parallel.dp
        kind = self.quant.weights if self.quant.of(linear).bits < 16 else self.quant.base
        seconds = self.products.experts(
            kind,
            everyone,
            hidden=self.model.hidden,
            inner=linear.inputs,
            used=linear.used,
            experts=linear.experts,
            slices=1 if self.parallel.ep else ranks,
            spread=ranks if self.parallel.ep else 1,
            distribution=self.distribution,
        )
        if self.parallel.dp > 1:
            size = everyone * self.model.hidden * 2.0
            for way in ("all_gather", "reduce_scatter"):
                seconds = seconds + self.products.collective(way, size, ranks, "nccl")
        return seconds

    def _around(self, layer: Layer) -> float:
        """Rotary embedding and cache write of prompts; in decode they are part of the measured attention's launch.

        So many launches, whatever the tokens, reproduce AIConfigurator's times of a context's attention.
        """
        attention = layer.attention
        if attention is None or attention.latent:
            return 0.0
        return self.tables.launch_s * (12 if attention.normed else 4)

    def _exchange(self, tokens: FloatArray, how: AllReduce) -> FloatArray:
        """Seconds of all-reduces over tokens and of messages to the next stage."""
        size, tp, layers = tokens * self.model.hidden * 2.0, self.parallel.tp, len(self.model.layers)
        gathered = sum(layer.moe for layer in self.model.layers) if self.parallel.dp > 1 else 0
        seconds = (2 * layers + 1 - gathered) * self.products.collective("all_reduce", size, tp, how)
        messages = self.parallel.pp - 1
        return seconds + messages * (self.tables.link_s + 2 * size / self.tables.link_bytes_s if messages else 0.0)

    def _fixed(self, tokens: float, sequences: float, prompts: bool) -> float:
        if tokens > self.max_tokens:
            tokens = self.outside.clamp("tokens", tokens, 0, self.max_tokens)
        rows = self._prompt_list if prompts else self._decode_list
        head = self._head_list[min(int(sequences), self.max_tokens)]
        return float(rows[int(tokens)] + head + self.step_s + self.sequence_s * sequences)

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        if not steps.tokens:
            return 0.0
        seconds = self._fixed(steps.tokens, steps.sequences, bool(steps.prefill_tokens))
        for count, kernel in self._attention:
            if steps.prefill_tokens:
                seconds += count * kernel.prompt_seconds(
                    steps.prefill_tokens, steps.prefill_chunks, steps.prefill_context, steps.prefill_pairs
                )
            if steps.decode_sequences:
                mean = steps.decode_context / steps.decode_sequences
                seconds += count * kernel.decode_seconds(int(steps.decode_sequences), mean)[0]
        return seconds

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        tokens = self.outside.clamp_all("tokens", rows.tokens, 0, self.max_tokens).astype(int)
        sequences = np.minimum(rows.sequences, self.max_tokens).astype(int)
        found = np.where(rows.prefill_tokens > 0, self._prompt_rows[tokens], self._decode_rows[tokens])
        found = found + self._head[sequences] + self.step_s + self.sequence_s * rows.sequences
        for count, kernel in self._attention:
            found = found + count * kernel.many(rows)
        return np.where(rows.tokens > 0, found, 0.0)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`; it holds up to the next measured context."""
        seconds, slope, holds, mean = self._fixed(sequences, sequences, False), 0.0, np.inf, context / sequences
        for count, kernel in self._attention:
            one, growth, ahead = kernel.decode_seconds(sequences, mean)
            seconds, slope = seconds + count * one, slope + count * growth
            holds = min(holds, ahead - mean)
        return DecodeLine(seconds, slope, max(1.0, float(holds)))

    def host_seconds(self, sequences: int) -> float:
        """See `LatencySource`."""
        return self.step_s + self.sequence_s * sequences

    def encode_seconds(self, items: Iterable[ImageCost]) -> float:
        """Seconds of a batch of images or sounds through the encoder; see `AicEncoder`."""
        if self._encoder is None:
            host = self.step_s * 1e6
            self._encoder = AicEncoder(
                self.model, self.quant, self.parallel, self.tables, step_us=host, outside=self.outside
            )
        return self._encoder.seconds(items)

    def describe(self) -> dict[str, Any]:
        """See `LatencySource`; with the versions of the tables that answered and the host times."""
        host = {"step_us": self.step_s * 1e6, "sequence_us": self.sequence_s * 1e6, "request_us": self.request_s * 1e6}
        return super().describe() | {"tables": dict(self.tables.versions), **host}
