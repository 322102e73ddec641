"""Time of one iteration of a stage by APEX's rules: cells over tokens, and what moves between them."""

from __future__ import annotations

from vllm_suite.planner.apex.kernels import Exchanges, Kernels, attention_length, rounded
from vllm_suite.planner.apex.space import Block, Exchange, Scheme, exchange


class StageTimes:
    """Microseconds of an iteration of one stage.

    Decoded tokens attend as if each were a prompt of one token, so their context does not matter; grouped queries are
    costed as if every head had keys of its own; prompts are costed as so many of the mean length. Attention sees the
    tokens of its own replica, the feed-forward network its share of the tokens of all.
    """

    def __init__(
        self, block: Block, scheme: Scheme, kernels: Kernels, moves: Exchanges, per_node: int, cluster_devices: int
    ) -> None:
        """Args: `per_node` devices of a node of the cluster, `cluster_devices` of all nodes."""
        self.block, self.scheme, self.kernels, self.moves, self.per_node = block, scheme, kernels, moves, per_node
        self.layers = block.layers // scheme.stages
        self.heads = block.heads_on(scheme.attention[1])[0]
        self.after_attention, self.after_feed_forward = exchange(block, scheme)
        replica = cluster_devices // scheme.replicas
        self._in_node = replica <= per_node
        self._linear: dict[int, float] = {}
        self._scores: dict[tuple[int, int], float] = {}

    def microseconds(self, tokens: int, prompts: int, prompt_tokens: int, decoding: int) -> float:
        """Of an iteration; every argument is of one replica of the attention cell.

        Args:
            tokens: prompt tokens and one for each decoding request.
        """
        total = self._over_tokens(tokens)
        if prompts:
            total += self.layers * self._attention(prompts, attention_length(prompt_tokens / prompts))
        if decoding:
            total += self.layers * self._attention(decoding, 16)
        return total

    def _attention(self, batch: int, length: int) -> float:
        key = (batch, length)
        if key not in self._scores:
            self._scores[key] = self.kernels.attention(self.heads, self.block.head, batch, length)
        return self._scores[key]

    def _over_tokens(self, tokens: int) -> float:
        if tokens not in self._linear:
            everything = tokens * self.scheme.attention[0]
            fed = -(-everything // self.scheme.feed_forward[0])
            own = -(-everything // self.scheme.attention[0])
            block = self._projections(tokens) + self._moves(self.after_attention, float(own))
            returned = max(fed // self.scheme.feed_forward[1], 1) if self.scheme.whole_experts else fed
            block += self._feed_forward(fed) + self._moves(self.after_feed_forward, float(returned))
            total = self.layers * block
            if self.scheme.stages > 1:
                # Once an iteration, not once for each boundary.
                total += self.moves.hand_over(tokens * float(self.block.hidden), in_node=self._in_node)
            self._linear[tokens] = total
        return self._linear[tokens]

    def _projections(self, tokens: int) -> float:
        count, hidden, width = rounded(tokens), self.block.hidden, self.heads * self.block.head
        return self.kernels.product(3 * width, hidden, count) + self.kernels.product(hidden, width, count)

    def _feed_forward(self, tokens: int) -> float:
        block, (_, devices) = self.block, self.scheme.feed_forward
        filters, experts = -(-block.inner // devices), block.experts
        if self.scheme.whole_experts:
            filters, experts = block.inner, -(-block.experts // devices)
        if block.experts > 1:
            tokens = max(tokens * block.used // block.experts, 1)
        count = rounded(tokens)
        wide = self.kernels.product(filters, block.hidden, count)
        return experts * ((block.matrices - 1) * wide + self.kernels.product(block.hidden, filters, count))

    def _moves(self, steps: tuple[Exchange, ...], tokens: float) -> float:
        total = 0.0
        for step in steps:
            tokens = max(tokens * step.factor, 1)
            if step.kind == "all_gather":
                tokens *= step.devices
            total += self.moves.microseconds(step.kind, step.devices, self.per_node, tokens * self.block.hidden)
            if step.kind == "reduce_scatter":
                tokens = max(tokens // step.devices, 1)
        return total
