"""Keys and values of all tail layers from the head's output: one projection, one write per cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vllm_suite.compat.models import (
    MergedColumnParallelLinear,
    VllmConfig,
    get_tensor_model_parallel_world_size,
)
from vllm_swiftkv.families import Family
from vllm_swiftkv.models.attention import TailCache
from vllm_swiftkv.models.writer import KernelWriter, make_writer


class LateKVLinear(MergedColumnParallelLinear):
    """K and V projections of every leader in one matrix: shards ``2 * j`` (K) and ``2 * j + 1`` (V) of leader j.

    With fewer KV heads than tensor-parallel ranks each head is given to several ranks, as vLLM's own QKV
    projection does it.
    """

    def __init__(
        self, hidden_size: int, leaders: int, kv_heads: int, head_dim: int, bias: bool, quant_config: Any, prefix: str
    ) -> None:
        tp = get_tensor_model_parallel_world_size()
        self.copies = max(1, tp // kv_heads)
        self.kv_heads = kv_heads
        super().__init__(
            hidden_size,
            [kv_heads * self.copies * head_dim] * (2 * leaders),
            bias=bias,
            quant_config=quant_config,
            prefix=prefix,
        )

    def weight_loader(self, param: Any, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
        super().weight_loader(param, self._spread(param, loaded_weight), loaded_shard_id)

    def weight_loader_v2(self, param: Any, loaded_weight: torch.Tensor, loaded_shard_id: Any = None) -> None:
        super().weight_loader_v2(param, self._spread(param, loaded_weight), loaded_shard_id)

    def _spread(self, param: Any, weight: torch.Tensor) -> torch.Tensor:
        dim = getattr(param, "output_dim", None)
        if self.copies == 1 or dim is None or weight.ndim <= dim or weight.shape[dim] % self.kv_heads:
            return weight
        heads = weight.unflatten(dim, (self.kv_heads, -1))
        return heads.repeat_interleave(self.copies, dim=dim).flatten(dim, dim + 1)


class LateKV(nn.Module):
    """The projection, K norms and RoPE. The norm weights and the caches belong to the tail layers.

    Args:
        like: vLLM's attention module of a head layer; geometry and RoPE are taken from it.
        caches: attention modules of the leaders, in order.
        prefix: of the projection; quantization looks names up by it.
        kernel_setting: ``late_kv_kernel`` of the plugin's settings.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        family: Family,
        like: Any,
        caches: Sequence[TailCache],
        prefix: str,
        kernel_setting: str,
    ) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.proj = LateKVLinear(
            config.hidden_size,
            len(caches),
            like.total_num_kv_heads,
            like.head_dim,
            family.has_qkv_bias(config),
            vllm_config.quant_config,
            prefix,
        )
        self.rows = like.total_num_kv_heads * like.head_dim  # of one leader's K or V in a checkpoint
        self.shape = (len(caches), 2, like.num_kv_heads, like.head_dim)
        self.rotary_emb = like.rotary_emb
        self._norms = tuple(cache.k_norm for cache in caches if hasattr(cache, "k_norm"))
        device = next(self.proj.parameters()).device
        attentions = [cache.attn for cache in caches]
        self._writer = make_writer(kernel_setting, device, attentions, like.rotary_emb, self._norms)

    def forward(self, positions: torch.Tensor, normed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``normed`` [tokens, hidden] -> what `write` takes.

        K with RoPE and V, each [tokens, leaders, kv_heads, head_dim]; or, for the kernel, the projection as it is.
        """
        both, _ = self.proj(normed)
        if isinstance(self._writer, KernelWriter):
            return (both,)
        k, v = both.unflatten(-1, self.shape).unbind(2)
        if self._norms:
            k = torch.stack([norm(k[:, j].contiguous()) for j, norm in enumerate(self._norms)], dim=1)
        rotated, _ = self.rotary_emb(positions, k.reshape(k.shape[0], -1), None)
        return rotated.view(k.shape), v

    def write(self, positions: torch.Tensor, *late: torch.Tensor) -> None:
        """Put K and V of this step into the leaders' caches, at the slots of vLLM's forward context.

        Called between the compiled regions: inside one, the writes have no user and may be removed as dead code.
        """
        self._writer.write(positions, *late)
