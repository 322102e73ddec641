"""KV heads given to several ranks: rank r takes head ``r // copies``, as vLLM's own QKV projection does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
from vllm_swiftkv.models.late_kv import LateKVLinear


@pytest.mark.parametrize(("kv_heads", "copies"), [(1, 4), (2, 2), (2, 4)])
@pytest.mark.parametrize("dim", [0, 1])
def test_each_rank_finds_its_head(kv_heads: int, copies: int, dim: int) -> None:
    head_dim = 3
    weight = torch.randn(*((kv_heads * head_dim, 5) if dim == 0 else (5, kv_heads * head_dim)))
    spread = LateKVLinear._spread(
        SimpleNamespace(kv_heads=kv_heads, copies=copies), SimpleNamespace(output_dim=dim), weight
    )
    for rank in range(kv_heads * copies):
        assert torch.equal(
            spread.narrow(dim, rank * head_dim, head_dim), weight.narrow(dim, rank // copies * head_dim, head_dim)
        )


def test_scales_of_the_whole_matrix_stay() -> None:
    layer = SimpleNamespace(kv_heads=2, copies=2)
    assert LateKVLinear._spread(layer, SimpleNamespace(output_dim=0), torch.tensor(3.0)).shape == ()
    assert LateKVLinear._spread(layer, SimpleNamespace(), torch.ones(4)).shape == (4,)
