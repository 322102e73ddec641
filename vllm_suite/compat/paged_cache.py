"""Where one attention layer keeps its keys and values. Private to vLLM: `Attention` has no accessor for them."""

from __future__ import annotations

from typing import Any

# Backends whose cache is [blocks, kv_heads, block_size, 2 * head_dim]; others pack differently.
SPLIT_BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")


def address(attention: Any) -> int:
    """Address of the layer's cache; another one after vLLM allocated anew."""
    return int(attention.kv_cache.data_ptr())


def views(attention: Any, stored: Any = None) -> tuple[Any, Any]:
    """Key and value cache, each [blocks, block_size, kv_heads, head_dim]; read as dtype ``stored`` where given."""
    key, value = attention.kv_cache.transpose(1, 2).split(attention.head_size, dim=-1)
    return (key, value) if stored is None else (key.view(stored), value.view(stored))


def scales(attention: Any) -> tuple[Any, Any]:
    """Scales of quantised keys and values: a stored value is ``x / scale``."""
    return attention._k_scale, attention._v_scale
