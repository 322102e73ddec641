"""The late-KV kernel on a real GPU: the interpreter's random cases, CUDA graphs, caches beyond 2**31 elements."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("triton", reason="triton is not installed here")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit" / "kernels"))

from late_kv_cases import FP8, check, draw  # noqa: E402

from suite_kernels import late_kv, late_kv_reference  # noqa: E402
from suite_kernels.late_kv_caches import PagedCaches  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not late_kv.available("cuda"), reason="no NVIDIA GPU of compute capability 8.0 or more"),
]
SEED = random.SystemRandom().randrange(1 << 30)


def test_random_writes_equal_the_reference_and_touch_nothing_else() -> None:
    print(f"seed {SEED}")
    for seed in range(SEED, SEED + 60):
        case = draw(seed)
        if late_kv.choose("cuda", case.cache_dtype, "auto").reason.startswith("compute capability"):
            continue
        check(case, "cuda", exact=True)


def test_a_captured_write_takes_new_inputs_at_replay() -> None:
    make = torch.Generator().manual_seed(SEED)
    gemm = torch.randn(64, 16 * 2 * 8 * 128, generator=make).to(torch.bfloat16).cuda()
    table = torch.randn(100, 128, generator=make).to(torch.bfloat16).cuda()
    positions, slots = torch.randint(0, 100, (64,), generator=make).cuda(), torch.full((64,), -1).cuda()
    found, wanted = (torch.zeros(16, 2, 8, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    caches = PagedCaches.of([(layer[0], layer[1]) for layer in found])
    arguments = (gemm, positions, table, slots, caches)
    late_kv.write_late_kv(*arguments, is_neox_style=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        late_kv.write_late_kv(*arguments, is_neox_style=True)
    slots.copy_(torch.randperm(128, generator=make)[:64])
    gemm.mul_(-0.5)
    graph.replay()
    reference = PagedCaches.of([(layer[0], layer[1]) for layer in wanted])
    late_kv_reference.write_late_kv(gemm, positions, table, slots, reference, is_neox_style=True)
    assert torch.equal(found, wanted)


def test_offsets_beyond_32_bits() -> None:
    blocks = (1 << 31) // (16 * 8 * 128) + 8  # of a K cache alone, in elements
    free, _ = torch.cuda.mem_get_info()
    dtype = torch.bfloat16
    if free < 3 * blocks * 16 * 8 * 128 * dtype.itemsize:
        pytest.skip("not enough free GPU memory")
    key, value = (torch.zeros(blocks, 16, 8, 128, dtype=dtype, device="cuda") for _ in "kv")
    gemm = torch.randn(3, 2 * 8 * 128, device="cuda").to(dtype)
    table = torch.cat((torch.ones(4, 64), torch.zeros(4, 64)), dim=1).to("cuda", dtype)  # angle 0: K as it is
    slots = torch.tensor([blocks * 16 - 1, 0, (blocks - 5) * 16], device="cuda")
    late_kv.write_late_kv(
        gemm, torch.zeros(3, dtype=torch.int64, device="cuda"), table, slots, PagedCaches.of([(key, value)]),
        is_neox_style=True,
    )  # fmt: skip
    for cache, wanted in ((key, gemm[:, :1024]), (value, gemm[:, 1024:])):
        assert torch.equal(cache.view(-1, 1024)[slots], wanted)
        assert int((cache.view(-1, 1024) != 0).any(dim=1).sum()) == 3


def test_fp8_saturates_and_keeps_nan() -> None:
    if late_kv.choose("cuda", FP8, "auto").reason.startswith("compute capability"):
        pytest.skip("FP8 needs compute capability 8.9")
    caches = PagedCaches.of([tuple(torch.zeros(1, 16, 1, 64, device="cuda").to(FP8) for _ in "kv")], [0.5], [2.0])
    gemm = torch.full((1, 128), 1e9, device="cuda", dtype=torch.bfloat16)
    gemm[0, 3], gemm[0, 100] = float("nan"), -1e9
    table = torch.cat((torch.ones(1, 32), torch.zeros(1, 32)), dim=1).cuda()
    zero = torch.zeros(1, dtype=torch.int64, device="cuda")
    late_kv.write_late_kv(gemm, zero, table, zero, caches, is_neox_style=True)
    key, value = caches.keys[0][0, 0, 0].float().cpu(), caches.values[0][0, 0, 0].float().cpu()
    assert key[3].isnan()
    assert key[0] == 448
    assert value[36] == -448
