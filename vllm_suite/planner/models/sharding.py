"""How vLLM cuts a model over ranks: tensor, pipeline, data and expert parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from vllm_suite.planner.models.shapes import Attention, Layer, Linear, Model, ModelError

VOCAB_PADDING = 64
"""vLLM pads the embedding's rows to a multiple of this, and each rank's share with it."""


@dataclass(frozen=True)
class Parallel:
    """How one engine is cut.

    Attributes:
        tp, pp: tensor- and pipeline-parallel size.
        dp: data-parallel size inside the engine: attention is replicated, the experts are cut over all tp x dp ranks.
            1 for a dense model, whose replicas are engines of their own.
        ep: whole experts on ranks instead of a slice of every expert (``--enable-expert-parallel``).
        encoder_data: the encoder is replicated and images are dealt out (``--mm-encoder-tp-mode data``), not cut.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    encoder_data: bool = False

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.dp) < 1:
            raise ModelError(f"parallel sizes are at least 1, not tp {self.tp}, pp {self.pp}, dp {self.dp}")

    @property
    def gpus(self) -> int:
        """GPUs of the engine."""
        return self.tp * self.pp * self.dp

    @property
    def expert_ranks(self) -> int:
        """Ranks that share a layer's experts."""
        return self.tp * self.dp


def check(model: Model, parallel: Parallel) -> None:
    """Refuse what vLLM refuses. Raises ModelError saying which number does not divide."""
    if parallel.pp > len(model.layers):
        raise ModelError(f"{model.name}: {len(model.layers)} layers cannot be cut into {parallel.pp} stages")
    if parallel.ep and not model.moe:
        raise ModelError(f"{model.name} has no experts to spread (ep)")
    if parallel.dp > 1 and not model.moe:
        raise ModelError(f"{model.name} has no experts: its replicas are engines of their own (dp 1)")
    tp = parallel.tp
    for layer in dict.fromkeys(model.layers):
        attention = layer.attention
        if attention and attention.heads % tp:
            raise ModelError(f"{model.name}: {attention.heads} heads cannot be cut over {tp} ranks")
        if attention and not attention.latent and attention.kv_heads % tp and tp % attention.kv_heads:
            raise ModelError(f"{model.name}: {attention.kv_heads} KV heads and {tp} ranks do not divide each other")
        for linear in layer.linears:
            ranks = _ranks(linear, parallel)
            width = linear.outputs if linear.split == "column" else linear.inputs
            if linear.split != "none" and not linear.kv_outputs and width % ranks:
                raise ModelError(f"{model.name}: {linear.name} ({width}) cannot be cut over {ranks} ranks")


@dataclass(frozen=True)
class RankLinear:
    """A product as one rank has it: its shape there, and the experts it holds."""

    linear: Linear
    inputs: int
    outputs: int
    experts: int

    @property
    def weights(self) -> int:
        """Values in the rank's matrices."""
        return self.experts * self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Values in the rank's biases."""
        return self.experts * self.outputs if self.linear.bias else 0


def _ranks(linear: Linear, parallel: Parallel) -> int:
    if linear.experts == 1:
        return parallel.tp
    return 1 if parallel.ep else parallel.expert_ranks


def on_rank(linear: Linear, parallel: Parallel) -> RankLinear:
    """A product on the rank that holds most of it."""
    ranks = _ranks(linear, parallel)
    inputs, outputs = linear.inputs, linear.outputs
    if linear.split == "row":
        inputs //= ranks
    elif linear.split == "column":
        # Keys and values stay in whole heads: with more ranks than heads several ranks hold the same one.
        kv = linear.kv_outputs // min(ranks, linear.kv_heads) if linear.kv_outputs else 0
        outputs = (outputs - linear.kv_outputs) // ranks + kv
    experts = linear.experts
    if experts > 1 and parallel.ep:
        experts = ceil(experts / parallel.expert_ranks)
    return RankLinear(linear, inputs, outputs, experts)


def cache_share(attention: Attention, tp: int) -> float:
    """The part of a layer's cache that each rank holds; 1 for MLA, whose compressed row every rank needs."""
    return 1.0 if attention.latent else 1.0 / min(tp, attention.kv_heads)


def stages(model: Model, pp: int) -> tuple[tuple[Layer, ...], ...]:
    """The layers of each pipeline stage as vLLM deals them out: what is left over goes to stages before the last."""
    count = len(model.layers)
    sizes = [count // pp] * pp
    for back in range(2, count % pp + 2):
        sizes[-back] += 1
    ends = [sum(sizes[: index + 1]) for index in range(pp)]
    return tuple(model.layers[end - size : end] for end, size in zip(ends, sizes, strict=True))


def vocab_rows(model: Model, tp: int) -> int:
    """Rows of the embedding, and of the output head, on one rank."""
    return ceil(ceil(model.vocab / VOCAB_PADDING) * VOCAB_PADDING / tp)


def counted(layers: tuple[Layer, ...]) -> Iterator[tuple[Layer, int]]:
    """Each different layer and how many there are of it."""
    found: dict[int, tuple[Layer, int]] = {}
    for layer in layers:
        found[id(layer)] = (layer, found.get(id(layer), (layer, 0))[1] + 1)
    return iter(found.values())
