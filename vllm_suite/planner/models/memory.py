"""Bytes on a GPU: weights of a rank, cache per token, and how many tokens fit beside them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from vllm_suite.planner.models.quant import Quantization
from vllm_suite.planner.models.shapes import Model, ModelError
from vllm_suite.planner.models.sharding import Parallel, cache_share, counted, on_rank, stages, vocab_rows


def weight_bytes(model: Model, quant: Quantization, parallel: Parallel, stage: int = 0) -> float:
    """Bytes of weights on each rank of a pipeline stage.

    The embedding is on the first stage, output head, last norm and learned positions are counted on the last one, the
    encoder, cut or replicated as `parallel` says, on the first.
    """
    total = 0.0
    for layer, count in counted(stages(model, parallel.pp)[stage]):
        held = layer.small * quant.base_bytes
        for linear in layer.linears:
            rank = on_rank(linear, parallel)
            held += quant.linear_bytes(linear, rank.weights, rank.biases)
        total += count * held
    ends = vocab_rows(model, parallel.tp) * model.hidden * quant.base_bytes
    last = stage == parallel.pp - 1
    if stage == 0:
        total += ends
        share = 1 if parallel.encoder_data else parallel.tp
        total += model.encoder_params * quant.base_bytes / share
    if last and model.head and not (model.tied and stage == 0):
        total += ends
    return total + (model.outside * quant.base_bytes if last else 0)


def kv_bytes_per_token(model: Model, quant: Quantization, parallel: Parallel, stage: int = 0) -> float:
    """Bytes that one more token takes in the cache of each rank of a stage, before any sliding window closes."""
    return sum(each for each, _ in _per_layer(model, quant, parallel, stage))


def kv_bytes(
    model: Model, quant: Quantization, parallel: Parallel, tokens: int, *, stage: int = 0, block: int = 16
) -> float:
    """Bytes of one sequence's cache on each rank of a stage, in whole blocks.

    A layer with a sliding window keeps the blocks that the window touches; vLLM frees the others.
    """
    total = 0.0
    for each, window in _per_layer(model, quant, parallel, stage):
        blocks = ceil(tokens / block)
        if window is not None:
            # A window that begins inside a block touches one more.
            blocks = min(blocks, ceil((window - 1) / block) + 1)
        total += each * blocks * block
    return total


def _per_layer(model: Model, quant: Quantization, parallel: Parallel, stage: int) -> list[tuple[float, int | None]]:
    found = []
    for layer in stages(model, parallel.pp)[stage]:
        attention = layer.attention
        if attention is None or not attention.kv_values:
            continue
        heads = 1 if attention.latent else attention.kv_heads
        size = quant.cache_bytes(attention.kv_values, heads) * cache_share(attention, parallel.tp)
        found.append((size, attention.window))
    return found


def activation_bytes(model: Model, quant: Quantization, parallel: Parallel, tokens: int, sequences: int) -> float:
    """An estimate of the peak beside weights and cache in a step of so many tokens and sequences.

    The widest place of a layer with its input, or the logits with the sampler's float32 copies. vLLM measures this
    when it starts; the estimate leaves out workspaces, which `kv_capacity` takes as a number of their own.
    """
    widest = 0
    for layer, _ in counted(model.layers):
        for linear in layer.linears:
            rank = on_rank(linear, parallel)
            widest = max(widest, rank.inputs + rank.outputs * linear.used)
    layer_peak = tokens * (2 * model.hidden + widest) * quant.activation_bytes
    logits = sequences * model.vocab * (quant.activation_bytes + 2 * 4) if model.head else 0.0
    return max(layer_peak, logits)


@dataclass(frozen=True)
class KvCapacity:
    """What fits.

    Attributes:
        tokens: tokens of cache, in whole blocks, of the stage that holds fewest; before any sliding window closes.
        free_bytes: bytes for the cache on each rank of that stage.
        stage: that stage.
    """

    tokens: int
    free_bytes: float
    stage: int


def kv_capacity(
    model: Model,
    quant: Quantization,
    parallel: Parallel,
    memory: float,
    *,
    utilisation: float = 0.9,
    activations: float = 0.0,
    overhead: float = 0.0,
    block: int = 16,
) -> KvCapacity:
    """Tokens of cache beside the weights.

    Args:
        memory: bytes of one GPU.
        utilisation: share of it that the engine may take (``--gpu-memory-utilization``).
        activations: bytes of the largest step, see `activation_bytes`.
        overhead: bytes of contexts, communicators, graphs and workspaces.

    Raises:
        ModelError: the weights do not fit, and by how much.
    """
    worst: KvCapacity | None = None
    for stage in range(parallel.pp):
        weights = weight_bytes(model, quant, parallel, stage)
        free = memory * utilisation - weights - activations - overhead
        if free <= 0:
            raise ModelError(
                f"{model.name} does not fit: stage {stage} holds {weights / 2**30:.1f} GiB of weights on each GPU, "
                f"{-free / 2**30:.1f} GiB more than there is"
            )
        each = kv_bytes_per_token(model, quant, parallel, stage)
        tokens = floor(free / each / block) * block if each else 2**62
        if worst is None or tokens < worst.tokens:
            worst = KvCapacity(tokens, free, stage)
    assert worst is not None
    return worst


def closed_form_tokens(gpus: int, usable: float, weights: float, layers: int, hidden: int) -> float:
    """DistServe's KV capacity of a multi-head model in 16 bits: what is free on all GPUs over two rows per layer."""
    return (gpus * usable - weights) / (2 * layers * hidden * 2)
