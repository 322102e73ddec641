"""The writer of late keys and values: which one is taken, and what the kernel's writer hands to the kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from suite_kernels import late_kv, late_kv_reference
from vllm_swiftkv.families import SwiftKVError

pytest.importorskip("vllm")
from vllm_swiftkv.models import writer

BLOCKS, BLOCK, HEADS, DIM, TOKENS, LEADERS = 6, 16, 2, 8, 19, 3


class Backend:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_name(self) -> str:
        return self.name


def attention(name: str, backend: str = "FLASH_ATTN", cache: str = "auto") -> Any:
    return SimpleNamespace(
        layer_name=name,
        attn_backend=Backend(backend),
        kv_cache_dtype=cache,
        head_size=DIM,
        kv_cache=torch.full((BLOCKS, HEADS, BLOCK, 2 * DIM), torch.nan),
        _k_scale=torch.tensor(1.0),
        _v_scale=torch.tensor(1.0),
    )


@pytest.fixture
def rotary() -> Any:
    angles = torch.arange(64.0)[:, None] / 10_000 ** (torch.arange(0, DIM, 2) / DIM)
    return SimpleNamespace(cos_sin_cache=torch.cat((angles.cos(), angles.sin()), -1), is_neox_style=True)


@pytest.mark.parametrize(
    ("backend", "cache", "reason"),
    [("CPU_ATTN", "auto", "CPU_ATTN"), ("FLASH_ATTN", "nvfp4", "nvfp4"), ("FLASH_ATTN", "auto", "cpu")],
)
def test_the_kernel_is_taken_only_where_it_can_run(rotary: Any, backend: str, cache: str, reason: str) -> None:
    layers = [attention("a", backend, cache)]
    made = writer.make_writer("auto", torch.device("cpu"), layers, rotary, ())
    assert isinstance(made, writer.OperatorWriter)
    with pytest.raises(SwiftKVError, match=f"(?i){reason}"):
        writer.make_writer("on", torch.device("cpu"), layers, rotary, ())


def test_the_kernel_gets_slots_weights_and_each_cache(monkeypatch: pytest.MonkeyPatch, rotary: Any) -> None:
    torch.manual_seed(5)
    layers = [attention(f"layer{j}") for j in range(LEADERS)]
    norms = [SimpleNamespace(weight=SimpleNamespace(data=torch.rand(DIM)), variance_epsilon=1e-5) for _ in layers]
    slots = torch.randperm(BLOCKS * BLOCK)[:TOKENS]
    monkeypatch.setattr(
        writer, "get_forward_context", lambda: SimpleNamespace(slot_mapping={a.layer_name: slots for a in layers})
    )
    # The Triton kernel itself runs in tests/unit/kernels; here its reference takes its place.
    monkeypatch.setattr(late_kv, "write_late_kv", late_kv_reference.write_late_kv)
    made = writer.KernelWriter(layers, rotary, norms)
    projected = torch.randn(TOKENS, LEADERS * 2 * HEADS * DIM)
    positions = torch.arange(TOKENS)
    made.write(positions, projected)
    values = projected.view(TOKENS, LEADERS, 2, HEADS, DIM)[:, :, 1]
    for j, layer in enumerate(layers):
        key, value = layer.kv_cache.transpose(1, 2).split(DIM, dim=-1)
        assert torch.equal(value.flatten(0, 1)[slots], values[:, j])
        assert not key.flatten(0, 1)[slots].isnan().any()
        assert layer.kv_cache.isnan().sum() == (BLOCKS * BLOCK - TOKENS) * HEADS * 2 * DIM
    # vLLM allocates anew after profiling: the writer follows.
    for layer in layers:
        layer.kv_cache = torch.full_like(layer.kv_cache, torch.nan)
    made.write(positions, projected)
    assert not layers[-1].kv_cache.isnan().all()


def test_nothing_is_written_while_profiling(monkeypatch: pytest.MonkeyPatch, rotary: Any) -> None:
    monkeypatch.setattr(writer, "get_forward_context", lambda: SimpleNamespace(slot_mapping={}))
    layers = [attention("a")]
    writer.KernelWriter(layers, rotary, ()).write(torch.arange(2), torch.zeros(2, 2 * HEADS * DIM))
    assert layers[0].kv_cache.isnan().all()
