"""The blocks that decoders are built of, as matrix products and attention."""

from __future__ import annotations

from vllm_suite.planner.models.shapes import Attention, Linear


def grouped_query(
    hidden: int, heads: int, kv_heads: int, head: int, *, window: int | None, normed: bool, bias: bool, out_bias: bool
) -> tuple[tuple[Linear, ...], Attention]:
    """Multi-head, grouped-query or multi-query attention; vLLM fuses q, k and v into one product."""
    queries, both = heads * head, 2 * kv_heads * head
    linears = (
        Linear("qkv_proj", hidden, queries + both, "column", bias, kv_outputs=both, kv_heads=kv_heads),
        Linear("o_proj", queries, hidden, "row", out_bias),
    )
    return linears, Attention(heads, kv_heads, head, head, both, window=window, normed=normed)


def latent(
    hidden: int, heads: int, *, q_rank: int, kv_rank: int, nope: int, rope: int, value: int, bias: bool
) -> tuple[tuple[Linear, ...], Attention, int]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), and the parameters of its two inner norms.

    The cache holds one compressed row and one rotary key for each token, whatever the number of heads, and every rank
    holds all of it. A decode step attends to the compressed rows; `kv_b_proj` is then folded into queries and outputs,
    which takes as much work per token as the product itself.
    """
    queries = heads * (nope + rope)
    first: tuple[Linear, ...]
    if q_rank:
        first = (
            Linear("q_a_proj", hidden, q_rank, bias=bias),
            Linear("q_b_proj", q_rank, queries, "column"),
        )
    else:
        first = (Linear("q_proj", hidden, queries, "column"),)
    linears = (
        *first,
        Linear("kv_a_proj", hidden, kv_rank + rope, bias=bias),
        Linear("kv_b_proj", kv_rank, heads * (nope + value), "column"),
        Linear("o_proj", heads * value, hidden, "row", bias),
    )
    return linears, Attention(heads, 1, nope + rope, value, kv_rank + rope, kv_rank, rope), q_rank + kv_rank


def dense_mlp(hidden: int, inner: int, gated: bool, bias: bool) -> tuple[Linear, ...]:
    """An ordinary MLP; vLLM fuses gate and up into one product."""
    if gated:
        first = Linear("gate_up_proj", hidden, 2 * inner, "column", bias)
    else:
        first = Linear("up_proj", hidden, inner, "column", bias)
    return first, Linear("down_proj", inner, hidden, "row", bias)


def expert_mlp(
    hidden: int, *, inner: int, experts: int, used: int, shared: int, shared_gate: bool, bias: bool, correction: bool
) -> tuple[tuple[Linear, ...], int]:
    """A mixture of experts with what every token passes beside it, and the parameters that no product has."""
    linears = [
        Linear("router", hidden, experts, bias=bias, quantised=False),
        Linear("experts_gate_up", hidden, 2 * inner, "column", bias, experts=experts, used=used),
        Linear("experts_down", inner, hidden, "row", bias, experts=experts, used=used),
    ]
    if shared:
        linears += [
            Linear("shared_gate_up", hidden, 2 * shared, "column"),
            Linear("shared_down", shared, hidden, "row"),
        ]
        if shared_gate:
            linears.append(Linear("shared_gate", hidden, 1, quantised=False))
    return tuple(linears), experts if correction else 0
