"""A model as the planner sees it: per layer its matrix products, its attention, and what little else has weights.

Everything that is asked of a model (parameters, bytes per rank, cache per token, work per step) is a sum over these
shapes, so a family is read once, in `read`, and nowhere else is there a case for it. Plain Python, no numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vllm_suite.media.families import Encoder

Split = Literal["column", "row", "none"]
"""How tensor parallelism cuts a product: its outputs, its inputs (an all-reduce follows), or not at all."""

Rows = Literal["tokens", "sampled"]
"""What a product runs over: every token of the step, or the decoded tokens and one token for each prompt chunk."""


class ModelError(ValueError):
    """The model cannot be described, or cannot be cut as asked. The text is meant for the person who gave it."""


@dataclass(frozen=True)
class Linear:
    """One matrix product with weights.

    Attributes:
        inputs, outputs: width of a row before and after; of one expert where there are several.
        split: how tensor parallelism cuts it.
        bias: it has a bias of `outputs` values.
        kv_outputs: how many of the outputs are keys and values; they are held in whole heads.
        kv_heads: number of these heads. With more ranks than heads each head is held by several ranks.
        experts: copies with weights of their own, 1 for an ordinary layer.
        used: experts that one row goes through.
        rows: what it runs over.
        quantised: a quantised checkpoint stores it quantised. False for routers.
    """

    name: str
    inputs: int
    outputs: int
    split: Split = "none"
    bias: bool = False
    kv_outputs: int = 0
    kv_heads: int = 0
    experts: int = 1
    used: int = 1
    rows: Rows = "tokens"
    quantised: bool = True

    @property
    def weights(self) -> int:
        """Values in the matrices."""
        return self.experts * self.inputs * self.outputs

    @property
    def params(self) -> int:
        """Weights and biases."""
        return self.weights + (self.experts * self.outputs if self.bias else 0)


@dataclass(frozen=True)
class Attention:
    """The part of a layer without weights: scores, and the cache they are computed from.

    Attributes:
        heads, kv_heads: query heads, and heads of keys and values; 1 for MLA, whose cache is one row for all heads.
        key, value: width of a head's keys and of its values.
        kv_values: cache elements per token, over all heads; 0 where another layer's cache is read.
        latent: MLA: width of the compressed row that a decode step attends to in place of keys and values; else 0.
        rope: MLA: width of the part of a key that carries the position, at the end of the compressed row.
        window: longest distance that is attended to, in tokens; None for all.
        normed: queries and keys are normed, with a weight for each value of a head.
        rows: what it runs over. SwiftKV's late layers run over sampled tokens only.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    kv_values: int
    latent: int = 0
    rope: int = 0
    window: int | None = None
    normed: bool = False
    rows: Rows = "tokens"


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `small` counts the parameters that every rank holds: norms, sinks, corrections."""

    linears: tuple[Linear, ...]
    attention: Attention | None
    small: int
    moe: bool = False

    @property
    def late(self) -> bool:
        """A SwiftKV layer after the cut: a prompt does not run through it."""
        return self.attention is not None and self.attention.rows == "sampled"

    @property
    def params(self) -> int:
        """Parameters of the layer."""
        return self.small + sum(linear.params for linear in self.linears)

    @property
    def active(self) -> float:
        """Parameters that one token goes through."""
        return self.small + sum(linear.params * linear.used / linear.experts for linear in self.linears)


@dataclass(frozen=True)
class Model:
    """A decoder, with or without an encoder beside it.

    Attributes:
        name, model_type: as the config has them.
        hidden: width of a token.
        vocab: rows of the embedding.
        layers: in order; equal layers are one object, so that work over them can be counted and not repeated.
        tied: the output head is the embedding.
        head: it has an output head; a prefill-only SwiftKV worker has none.
        outside: parameters outside the layers that are neither embedding nor output head: norms, learned positions.
        longest: longest sequence in tokens.
        dtype: of the checkpoint before any quantisation, by vLLM's name.
        encoder: what turns images, videos or sound into rows of the hidden width; None for a text model.
        assumed: what the config did not say and no known family settles; to be shown with every result.
    """

    name: str
    model_type: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool
    outside: int
    longest: int
    dtype: str = "bfloat16"
    head: bool = True
    encoder: Encoder | None = None
    assumed: tuple[str, ...] = ()

    @property
    def embedding(self) -> int:
        """Parameters of the embedding."""
        return self.vocab * self.hidden

    @property
    def encoder_params(self) -> int:
        """Parameters of the encoder and of what projects its output."""
        return self.encoder.params if self.encoder else 0

    @property
    def decoder_params(self) -> int:
        """Parameters without the encoder's."""
        ends = self.embedding * (2 if self.head and not self.tied else 1)
        return ends + self.outside + sum(layer.params for layer in self.layers)

    @property
    def params(self) -> int:
        """All parameters, as a checkpoint without quantisation counts them."""
        return self.decoder_params + self.encoder_params

    @property
    def active_params(self) -> float:
        """Parameters that one decoded token goes through: the experts it is sent to, the output head, no encoder."""
        return sum(layer.active for layer in self.layers) + self.outside + (self.embedding if self.head else 0)

    @property
    def moe(self) -> bool:
        """It has layers with experts."""
        return any(layer.moe for layer in self.layers)

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding windows of its layers, ascending."""
        return tuple(sorted({a.window for layer in self.layers if (a := layer.attention) and a.window is not None}))

    def kv_values(self) -> int:
        """Cache elements that one token adds over all layers, before any window closes."""
        return sum(layer.attention.kv_values for layer in self.layers if layer.attention)
