"""What a step is in operations on each rank, for utilisation, energy and reports; and the products it is made of."""

from __future__ import annotations

from typing import NamedTuple

from vllm_suite.planner.models.shapes import Layer, Model
from vllm_suite.planner.models.sharding import Parallel, RankLinear, counted, on_rank, stages, vocab_rows


class Operator(NamedTuple):
    """A product as a rank has it, and how many layers of the stage have it."""

    product: RankLinear
    layers: int


def operators(model: Model, parallel: Parallel, stage: int = 0) -> tuple[Operator, ...]:
    """Every matrix product of a stage's layers with its shape on one rank, in order of first use."""
    found: dict[RankLinear, int] = {}
    for layer, count in counted(stages(model, parallel.pp)[stage]):
        for linear in layer.linears:
            product = on_rank(linear, parallel)
            found[product] = found.get(product, 0) + count
    return tuple(Operator(product, count) for product, count in found.items())


class Operations(NamedTuple):
    """Floating-point operations of one rank, a multiply-add counted as two.

    A step's are the sum of each times its count.

    Attributes:
        per_token: of a token that the layers run over.
        per_sampled: of a sequence: output head, and layers that run over sampled rows only.
        per_pair: of a query-key pair of a prompt chunk.
        per_key: of a key that a decoded token attends to.
    """

    per_token: float
    per_sampled: float
    per_pair: float
    per_key: float


def operations(model: Model, parallel: Parallel, stage: int = 0) -> Operations:
    """Operations on each rank of a pipeline stage.

    Experts are taken to be used evenly. Keys beyond a sliding window count like the others, which is an upper
    bound.
    """
    token = sampled = pair = key = 0.0
    for layer, count in counted(stages(model, parallel.pp)[stage]):
        for linear in layer.linears:
            rank = on_rank(linear, parallel)
            # A data-parallel rank's experts serve every rank's tokens.
            rows = 1.0 if linear.experts == 1 else parallel.dp * linear.used * rank.experts / linear.experts
            work = 2.0 * rows * rank.inputs * rank.outputs * count
            token, sampled = (token + work, sampled) if linear.rows == "tokens" else (token, sampled + work)
        of_pair, of_key = _scores(layer, parallel.tp)
        if layer.late:
            # A prompt attends with one row: its keys are counted like decoded ones.
            of_pair = 0.0
        pair, key = pair + count * of_pair, key + count * of_key
    if stage == parallel.pp - 1 and model.head:
        sampled += 2.0 * vocab_rows(model, parallel.tp) * model.hidden
    return Operations(token, sampled, pair, key)


def _scores(layer: Layer, tp: int) -> tuple[float, float]:
    attention = layer.attention
    if attention is None:
        return 0.0, 0.0
    heads = attention.heads / tp
    pair = 2.0 * heads * (attention.key + attention.value)
    # MLA decodes over compressed rows: scores over all of a row, sums over all of it but the position.
    return pair, 2.0 * heads * (2 * attention.latent + attention.rope) if attention.latent else pair
