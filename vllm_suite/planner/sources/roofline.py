"""`roofline`: step times from shapes, peak rates and a few efficiency constants, with no measurement of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from vllm_suite.media.tokens import ImageCost
from vllm_suite.planner.hardware import Cluster
from vllm_suite.planner.hardware.collectives import Collectives
from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.models.sharding import check, stages
from vllm_suite.planner.sources.base import FloatArray, LatencySource, Outside, SourceError, Uncertainty, as_arrays
from vllm_suite.planner.sources.efficiency import Efficiency
from vllm_suite.planner.sources.steps import DecodeLine, Steps
from vllm_suite.planner.sources.work import AttentionCost, Work

UNCALIBRATED = Uncertainty(0.25, "roofline with default constants")
FITTED = Uncertainty(0.1, "roofline with constants fitted to this device, for another model or another step")


@dataclass(frozen=True)
class _Stage:
    """Seconds by rows as arrays that start at 0 rows, and the costs of attention."""

    tokens: FloatArray
    sampled: FloatArray
    attention: tuple[AttentionCost, ...]


class RooflineSource(LatencySource):
    """Step times of a model on a plan.

    Work over rows is tabulated once for every number of rows up to `max_tokens` and `max_sequences`; larger steps are
    refused or clamped, so these are the engine's own limits. Attention is a closed form of the step's sums. Layers with
    a sliding window are costed at the mean context, which is an upper bound.
    """

    def __init__(
        self,
        model: Model,
        quant: Quantization,
        parallel: Parallel,
        cluster: Cluster,
        *,
        efficiency: Efficiency | None = None,
        collectives: Collectives | None = None,
        max_tokens: int = 16_384,
        max_sequences: int = 2048,
        outside: Outside | None = None,
        uncertainty: Uncertainty | None = None,
    ) -> None:
        check(model, parallel)
        if parallel.gpus > cluster.gpus:
            raise SourceError(f"the plan needs {parallel.gpus} accelerators, there are {cluster.gpus}")
        self.name = f"roofline {model.name} on {cluster.device.name}"
        self.stages, self.outside = parallel.pp, outside or Outside()
        self.uncertainty = uncertainty or (FITTED if "matmul" in cluster.device.efficiency else UNCALIBRATED)
        self.model, self.parallel, self.cluster, self.quant = model, parallel, cluster, quant
        self.efficiency = efficiency or Efficiency.of(cluster.device)
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        shared = collectives or Collectives(cluster)
        per_stage = [self._stage(index, shared) for index in range(parallel.pp)]
        self._stages = per_stage
        self._tokens = np.sum([each.tokens for each in per_stage], axis=0)
        self._sampled = np.sum([each.sampled for each in per_stage], axis=0)
        self._attention = _merged(per_stage)
        # Plain lists answer a single query an order of magnitude faster than arrays.
        self._token_list, self._sampled_list = self._tokens.tolist(), self._sampled.tolist()
        self._slowest = _undominated(per_stage)
        self._fixed = self.efficiency.step_us * 1e-6
        self._per_sequence = self.efficiency.sequence_us * 1e-6

    def _stage(self, index: int, collectives: Collectives) -> _Stage:
        layers = stages(self.model, self.parallel.pp)[index]
        first, last = index == 0, index == self.parallel.pp - 1
        rank = index * self.parallel.expert_ranks
        work = Work(self.model, self.quant, self.parallel, self.efficiency, collectives, rank)
        tokens = np.arange(self.max_tokens + 1, dtype=float)
        sequences = np.arange(self.max_sequences + 1, dtype=float)
        sampled = work.layers(layers, "sampled", sequences)
        return _Stage(
            work.layers(layers, "tokens", tokens) + work.ends(first, last, tokens),
            sampled + work.head(sequences) if last else sampled,
            work.attention(layers),
        )

    def step_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        count, sequences = int(steps.tokens), int(steps.sequences)
        if count == 0:
            return 0.0
        if count > self.max_tokens:
            count = int(self.outside.clamp("tokens", count, 0, self.max_tokens))
        if sequences > self.max_sequences:
            sequences = int(self.outside.clamp("sequences", sequences, 0, self.max_sequences))
        seconds: float = self._token_list[count] + self._sampled_list[sequences]
        seconds += self._fixed + self._per_sequence * sequences
        for cost in self._attention:
            seconds += _one(cost, steps)
        return seconds

    def seconds(self, steps: Steps) -> FloatArray:
        """See `LatencySource`."""
        rows = as_arrays(steps)
        tokens = self.outside.clamp_all("tokens", rows.tokens, 0, self.max_tokens).astype(int)
        sequences = self.outside.clamp_all("sequences", rows.sequences, 0, self.max_sequences).astype(int)
        found = self._tokens[tokens] + self._sampled[sequences] + self._fixed + self._per_sequence * sequences
        for cost in self._attention:
            found = found + _many(cost, rows)
        return np.where(rows.tokens > 0, found, 0.0)

    def decode_line(self, sequences: int, context: float, longest: float = 0, shortest: float = 0) -> DecodeLine:
        """See `LatencySource`; it holds until a sliding window closes."""
        first = self.step_seconds(Steps(decode_sequences=sequences, decode_context=context))
        slope, holds = 0.0, float("inf")
        mean = context / sequences
        for cost in self._attention:
            if cost.window is None:
                slope += cost.per_key * sequences
            elif mean < cost.window:
                slope += cost.per_key * sequences
                holds = min(holds, cost.window - mean)
        return DecodeLine(first, slope, max(1.0, holds))

    def stage_seconds(self, steps: Steps) -> float:
        """See `LatencySource`."""
        prompts, chunks, decodes = steps[0], steps[1], steps[4]
        if self.stages == 1 or not prompts + decodes:
            return self.step_seconds(steps)
        count, sequences = int(prompts + decodes), int(chunks + decodes)
        if count > self.max_tokens:
            count = self.max_tokens
        if sequences > self.max_sequences:
            sequences = self.max_sequences
        slowest = 0.0
        for attention, rows in self._slowest:
            seconds = 0.0
            for tokens, sampled in rows:
                own = tokens[count] + sampled[sequences]
                if own > seconds:
                    seconds = own
            keys = 0.0
            for cost in attention:
                keys += _one(cost, steps)
            seconds += keys
            if seconds > slowest:
                slowest = seconds
        return slowest + self._fixed + self._per_sequence * sequences

    def host_seconds(self, sequences: int) -> float:
        """See `LatencySource`."""
        return self._fixed + self._per_sequence * min(sequences, self.max_sequences)

    def encode_seconds(self, items: Iterable[ImageCost]) -> float:
        """Seconds of a batch of images, frames or sounds through the encoder.

        Raises:
            SourceError: the model has none.
        """
        encoder, costs = self.model.encoder, list(items)
        if encoder is None:
            raise SourceError(f"{self.model.name} has no encoder")
        if not costs:
            return 0.0
        device, own, tower = self.cluster.device, self.efficiency, encoder.tower
        # Cut, each rank has a share of every product; dealt out, the rank with most items decides.
        share = -(-len(costs) // self.parallel.tp) / len(costs) if self.parallel.encoder_data else 1 / self.parallel.tp
        flops = sum(tower.flops(cost) for cost in costs) * share
        held = encoder.params * self.quant.base_bytes / (1 if self.parallel.encoder_data else self.parallel.tp)
        patches = sum(cost.tiles * cost.patches for cost in costs)
        moved = held + 12 * tower.layers * patches * tower.hidden * self.quant.activation_bytes * share
        peak = device.flops(self.quant.base) * own.matmul
        seconds = max(flops / peak, moved / (device.bandwidth * own.memory))
        # About ten kernels in a layer.
        return seconds + 10 * tower.layers * own.kernel_us * 1e-6 + self._fixed

    def encoder_output_bytes(self, cost: ImageCost) -> float:
        """Bytes that go from an encoder to a prefill instance for one item. Raises SourceError without an encoder."""
        if self.model.encoder is None:
            raise SourceError(f"{self.model.name} has no encoder")
        return cost.tokens * self.model.encoder.output_values * self.quant.activation_bytes


def _undominated(
    per_stage: list[_Stage],
) -> tuple[tuple[tuple[AttentionCost, ...], list[tuple[list[float], list[float]]]], ...]:
    """Stages by their attention, each with its seconds by rows, without those that another is never faster than."""
    found: dict[tuple[AttentionCost, ...], list[_Stage]] = {}
    for stage in per_stage:
        alike = found.setdefault(stage.attention, [])
        if not any(_covers(other, stage) for other in alike):
            alike[:] = [other for other in alike if not _covers(stage, other)] + [stage]
    return tuple(
        (attention, [(each.tokens.tolist(), each.sampled.tolist()) for each in alike])
        for attention, alike in found.items()
    )


def _covers(slow: _Stage, fast: _Stage) -> bool:
    return bool((slow.tokens >= fast.tokens).all() and (slow.sampled >= fast.sampled).all())


def _one(cost: AttentionCost, steps: Steps) -> float:
    seconds = 0.0
    if steps.prefill_tokens:
        if cost.sampled:
            keys = steps.prefill_context + steps.prefill_tokens
            seconds += cost.per_key * (keys if cost.window is None else min(keys, cost.window * steps.prefill_chunks))
        else:
            pairs, before = steps.prefill_pairs, steps.prefill_context
            if cost.window is not None:
                pairs = min(pairs, cost.window * steps.prefill_tokens)
                before = min(before, cost.window * steps.prefill_chunks)
            seconds += max(cost.per_pair * pairs, cost.per_cached * before)
    if steps.decode_sequences:
        keys = steps.decode_context
        each = cost.per_key_beside if steps.prefill_tokens else cost.per_key
        seconds += each * (keys if cost.window is None else min(keys, cost.window * steps.decode_sequences))
    return seconds


def _many(cost: AttentionCost, rows: Steps) -> FloatArray:
    window = np.inf if cost.window is None else float(cost.window)

    def limited(values: FloatArray, count: FloatArray) -> FloatArray:
        return values if cost.window is None else np.minimum(values, window * count)

    if cost.sampled:
        prompts = cost.per_key * limited(rows.prefill_context + rows.prefill_tokens, rows.prefill_chunks)
    else:
        prompts = np.maximum(
            cost.per_pair * limited(rows.prefill_pairs, rows.prefill_tokens),
            cost.per_cached * limited(rows.prefill_context, rows.prefill_chunks),
        )
    each = np.where(rows.prefill_tokens > 0, cost.per_key_beside, cost.per_key)
    found: FloatArray = prompts + each * limited(rows.decode_context, rows.decode_sequences)
    return found


def _merged(per_stage: list[_Stage]) -> tuple[AttentionCost, ...]:
    found: dict[tuple[int | None, bool], AttentionCost] = {}
    for each in (cost for stage in per_stage for cost in stage.attention):
        key = (each.window, each.sampled)
        old = found.get(key)
        if old is not None:
            each = AttentionCost(
                old.per_pair + each.per_pair,
                old.per_cached + each.per_cached,
                old.per_key + each.per_key,
                old.per_key_beside + each.per_key_beside,
                each.window,
                each.sampled,
            )
        found[key] = each
    return tuple(found.values())
