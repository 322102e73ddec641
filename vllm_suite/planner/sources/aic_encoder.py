"""Encoders of images and sound out of AIConfigurator's tables: products over patches, attention within a piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np

from vllm_suite.media.tokens import ImageCost
from vllm_suite.planner.models import Model, Parallel, Quantization
from vllm_suite.planner.sources.aic_attention import Surface
from vllm_suite.planner.sources.aic_products import Products
from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import Outside, SourceError


class AicEncoder:
    """Seconds of items through a model's encoder, in 16 bits as vLLM runs it.

    The network of a layer is taken as two products with the parameters that attention leaves, the projector as one over
    the rows of the output. Cut over ranks, each has a share of heads and network; dealt out (`encoder_data`),
    the rank with most items decides.
    """

    def __init__(
        self,
        model: Model,
        quant: Quantization,
        parallel: Parallel,
        tables: AicTables,
        *,
        step_us: float = 0.0,
        outside: Outside | None = None,
    ) -> None:
        """Read the tables. Raises SourceError where the model has no encoder, or its attention was not measured."""
        if model.encoder is None:
            raise SourceError(f"{model.name} has no encoder")
        self.model, self.parallel, self.tables, self.step_s = model, parallel, tables, step_us * 1e-6
        self.outside = outside or Outside()
        self.products, self.tower = Products(tables, self.outside), model.encoder.tower
        self.output = model.encoder.output_values
        self.ranks = 1 if parallel.encoder_data else parallel.tp
        self.weights = "bf16" if quant.base in ("bf16", "fp16") else quant.base
        tower = self.tower
        heads, head = tower.heads // self.ranks, tower.hidden // tower.heads
        if tower.heads % self.ranks:
            raise SourceError(f"{model.name}: {tower.heads} heads of its encoder cannot be cut over {self.ranks} ranks")
        rows = tables.rows(
            "encoder_attention",
            "encoder_attention_perf.parquet",
            ("batch_size", "isl"),
            {"num_heads": heads, "head_dim": head, "attn_dtype": "bfloat16"},
        )
        if not len(rows):
            raise SourceError(f"{tables.system}: an encoder's attention of {heads} heads of {head} was not measured")
        # Lengths that a single piece was measured at: others were for larger batches alone.
        self.attention = Surface(rows[np.isin(rows[:, 1], rows[rows[:, 0] == rows[0, 0]][:, 1])])
        self.inner = (tower.layer_params - 4 * tower.hidden**2) // (2 * tower.hidden)

    def seconds(self, items: Iterable[ImageCost]) -> float:
        """Of a batch of items."""
        costs = list(items)
        if not costs:
            return 0.0
        if self.parallel.encoder_data:
            # Dealt out: the first rank has as many as any.
            costs = costs[:: self.parallel.tp]
        tower, layers = self.tower, self.tower.layers
        patches = float(sum(cost.tiles * cost.patches for cost in costs))
        rows = float(sum(cost.tokens for cost in costs))
        total = layers * self._layer(patches) + self._rows(self.output, tower.projector // self.output, rows)
        pieces = Counter[int]()
        for cost in costs:
            pieces[cost.patches] += cost.tiles
        for size, count in pieces.items():
            total += (layers - tower.local) * self._scores(count, size)
            if tower.local:
                span = min(tower.span, size)
                total += tower.local * self._scores(max(1, round(count * size / span)), span)
        return total + self.step_s

    def _layer(self, patches: float) -> float:
        """Of a layer without its scores."""
        hidden, ranks = self.tower.hidden, self.ranks
        total = self._rows(3 * hidden // ranks, hidden, patches) + self._rows(hidden, hidden // ranks, patches)
        total += self._rows(self.inner // ranks, hidden, patches) + self._rows(hidden, self.inner // ranks, patches)
        # Two norms with the residual, the rotary embedding of queries and keys, the activation.
        sizes = np.array([4.0 * hidden, 4.0 * hidden, 12.0 * hidden / ranks, 2.0 * self.inner / ranks])
        total += float(self.tables.small(patches * 2.0 * sizes).sum())
        size = np.array([patches * hidden * 2.0])
        return total + 2 * float(self.products.collective("all_reduce", size, ranks, "graph")[0])

    def _rows(self, outputs: int, inputs: int, rows: float) -> float:
        return float(self.products.seconds(self.weights, np.array([rows]), outputs, inputs)[0])

    def _scores(self, pieces: int, patches: int) -> float:
        self.outside.clamp("patches", float(patches), 0.0, float(self.attention.second[-1]))
        return self.attention.at(pieces, float(patches))[0]
