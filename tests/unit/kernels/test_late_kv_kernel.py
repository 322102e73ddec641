"""The late-KV kernel: in Triton's interpreter against its reference, and as machine code for GPUs not present."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed here")
pytest.importorskip("triton", reason="triton is not installed here")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from late_kv_cases import FP8, LAYOUTS, POISON, Case, allocate, check, compare, draw

from suite_kernels import late_kv, late_kv_reference
from suite_kernels.late_kv_caches import PagedCaches

HERE = Path(__file__).resolve().parent
SEED = random.SystemRandom().randrange(1 << 30)


def python(*arguments: str, interpret: bool, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter: whether Triton interprets is decided when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=timeout, check=False, env=environment
    )


def test_random_writes_in_the_interpreter_equal_the_reference_and_touch_nothing_else() -> None:
    """Fresh shapes each run; the seed of a failure is in the message, and ``--seed`` of the script repeats it."""
    done = python(str(HERE / "late_kv_cases.py"), "--cases", "36", "--seed", str(SEED), interpret=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("\nok ") == 36


def test_offsets_beyond_32_bits() -> None:
    done = python(str(HERE / "late_kv_far.py"), interpret=True)
    assert done.stdout == "ok\n", f"status {done.returncode}: {done.stderr[-2000:]}"


def test_importing_is_light() -> None:
    code = (
        "import sys, suite_kernels; assert not {'torch', 'triton'} & set(sys.modules)\n"
        "import suite_kernels.late_kv, suite_kernels.late_kv_reference as r\n"
        "assert not any(name.startswith('suite_kernels.late_kv_triton') for name in sys.modules)"
    )
    done = python("-c", code, interpret=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    done = python(str(HERE / "late_kv_compiled.py"), interpret=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def test_compiled_code_moves_16_bytes_at_a_time(compiled: dict[str, Any]) -> None:
    for name in ("8B bf16", "8B bf16 sm_80", "8B bf16 sm_100", "70B TP8 bf16", "head 80"):
        operations = compiled[name]["operations"]
        # Per thread: two vectors of V, one of each half of K; cos and sin are read besides.
        assert operations["ld.global.v4.b32"] == 6, name
        assert {k: v for k, v in operations.items() if k.startswith("st.")} == {"st.global.v4.b32": 4}, name
    for name in ("8B fp8", "70B TP8 fp8"):
        stores = {k: v for k, v in compiled[name]["operations"].items() if k.startswith("st.global")}
        assert set(stores) <= {"st.global.v4.b32", "st.global.v2.b32"}, name
    assert "st.global.v4.b32" not in compiled["unaligned"]["operations"]


def test_compiled_code_rounds_and_saturates_in_hardware_and_never_spills(compiled: dict[str, Any]) -> None:
    for name in ("8B fp8", "8B fp8 norm", "70B TP8 fp8"):
        assert compiled[name]["operations"]["cvt.rn.satfinite.e4m3x2.f32"] == 16, name
    for name, facts in compiled.items():
        assert facts["spilled"] == 0, name
        assert facts["registers"] <= 64, name  # of 64 Ki per SM, so that 8 programs of 128 threads are resident
        assert not [operation for operation in facts["operations"] if operation.startswith("fma.")], name


def one_case(**changes: Any) -> Case:
    plain = Case(
        tokens=5,
        slots=5,
        leaders=2,
        heads=2,
        head_dim=8,
        rotary_dim=8,
        block_size=4,
        blocks=3,
        layout="HND",
        dtype=torch.float32,
        cache_dtype=torch.float32,
        neox=True,
        norm=False,
        row_padding=0,
        seed=SEED,
    )
    return replace(plain, **changes)


def by_hand(
    row: torch.Tensor, angle: torch.Tensor, neox: bool, weight: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """K of one head in float64, element by element, from the definition of RoPE."""
    x = row.double()
    if weight is not None:
        x = x / torch.sqrt((x * x).mean() + eps) * weight.double()
    out, half = x.clone(), len(angle) // 2
    for i in range(half):
        a, b = (i, i + half) if neox else (2 * i, 2 * i + 1)
        turn = complex(float(x[a]), float(x[b])) * complex(float(angle[i]), float(angle[half + i]))
        out[a], out[b] = turn.real, turn.imag
    return out


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("rotary", [8, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_what_the_definitions_say(neox: bool, norm: bool, rotary: int, layout: str) -> None:
    case = one_case(neox=neox, norm=norm, rotary_dim=rotary, layout=layout)
    make = torch.Generator().manual_seed(SEED)
    gemm = torch.randn(5, 2 * 2 * 2 * 8, generator=make)
    table = torch.randn(20, rotary, generator=make)
    weight = torch.randn(2, 8, generator=make) if norm else None
    positions, slots = torch.tensor([3, 0, 19, 7, 7]), torch.tensor([11, -1, 0, 12, 5])
    room, views = allocate(case, "cpu")
    late_kv_reference.write_late_kv(
        gemm, positions, table, slots, PagedCaches.of(views), is_neox_style=neox, k_norm_weight=weight, eps=1e-3
    )
    for token, slot in ((0, 11), (2, 0), (4, 5)):
        for layer in range(2):
            for head in range(2):
                start = layer * 32 + head * 8
                own = None if weight is None else weight[layer]
                k = by_hand(gemm[token, start : start + 8], table[positions[token]], neox, own, 1e-3)
                stored = [view[slot // 4, slot % 4, head] for view in views[layer]]
                torch.testing.assert_close(stored[0].double(), k, rtol=1e-5, atol=1e-5)
                assert torch.equal(stored[1], gemm[token, start + 16 : start + 24])
    assert int((room != POISON).sum()) <= 3 * 2 * 2 * 2 * 8 * 4


def test_fp8_values_are_divided_by_their_layers_scale_and_saturate() -> None:
    case = one_case(cache_dtype=FP8, leaders=2, heads=1, head_dim=2, rotary_dim=2)
    _, views = allocate(case, "cpu")
    caches = PagedCaches.of(views, [0.5, 2.0], [torch.tensor(4.0), 0.25])
    gemm = torch.tensor([[3.0, -4.0, 8.0, 1e9, 3.0, float("nan"), 8.0, -1e9]])
    table = torch.tensor([[1.0, 0.0]])
    late_kv_reference.write_late_kv(gemm, torch.tensor([0]), table, torch.tensor([6]), caches, is_neox_style=True)
    found = [view[1, 2, 0].float().tolist() for pair in views for view in pair]
    assert found[:2] == [[6.0, -8.0], [2.0, 448.0]]
    assert found[3] == [32.0, -448.0]
    assert found[2][1] != found[2][1]


def test_rope_is_vllms() -> None:
    rotary = pytest.importorskip("vllm.model_executor.layers.rotary_embedding.base")
    for seed in range(SEED, SEED + 4):
        case = draw(seed)
        make = torch.Generator().manual_seed(seed)
        k = torch.randn(case.tokens, case.heads, case.head_dim, generator=make)
        table = torch.randn(50, case.rotary_dim, generator=make)
        positions = torch.randint(0, 50, (case.tokens,), generator=make)
        wanted, _ = rotary.RotaryEmbedding.forward_static(
            positions, k, None, case.head_dim, case.rotary_dim, table, case.neox
        )
        found = late_kv_reference.rotate(k, table[positions][:, None], case.neox)
        assert torch.equal(found, wanted), case


@pytest.mark.parametrize("place", ["value", "key", "poison"])
def test_the_comparison_sees_one_wrong_byte(place: str) -> None:
    case = one_case(dtype=torch.bfloat16, cache_dtype=torch.bfloat16)
    pairs = [allocate(case, "cpu") for _ in range(2)]
    slots = torch.tensor([4, -1, 9])
    for _, views in pairs:
        for key, value in views:
            for slot in (4, 9):
                key[slot // 4, slot % 4] = 1.0
                value[slot // 4, slot % 4] = 2.0
    rooms, described = [room for room, _ in pairs], [PagedCaches.of(views) for _, views in pairs]
    assert compare(case, rooms, described, slots, exact=True) == 0
    view = pairs[0][1][1][1 if place == "value" else 0]
    block, offset = (1, 1) if place == "poison" else (2, 1)
    view.view(torch.uint8)[block, offset, 1, 3] ^= 1
    with pytest.raises(AssertionError, match="no slot" if place == "poison" else "is not"):
        compare(case, rooms, described, slots, exact=True)


def test_without_a_gpu_the_kernel_is_unavailable_and_says_so() -> None:
    assert late_kv.available("cpu") is False
    choice = late_kv.choose("cpu", torch.bfloat16)
    assert (choice.kernel, choice.reason) == (False, "it runs on CUDA devices and the caches are on cpu")
    assert late_kv.choose("cpu", torch.bfloat16, "off").reason == "switched off"
    with pytest.raises(ValueError, match="was asked for, but it runs on CUDA devices"):
        late_kv.choose("cpu", torch.bfloat16, "on")
    with pytest.raises(ValueError, match="unknown setting 'yes'"):
        late_kv.choose("cpu", torch.bfloat16, "yes")  # type: ignore[arg-type]
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(RuntimeError, match="runs on CUDA devices"):
            check(one_case(), "cpu", exact=True)


@pytest.mark.skipif(late_kv.available("cuda"), reason="a GPU is here, and the benchmark would measure it")
def test_the_gpu_benchmark_ends_with_one_line_where_there_is_no_gpu() -> None:
    done = python(str(HERE.parents[2] / "benchmarks" / "gpu_late_kv.py"), interpret=False)
    assert done.returncode == 2
    assert done.stderr == "gpu_late_kv: nothing to measure here: torch sees no CUDA device\n"
    assert done.stdout == ""


def test_caches_that_do_not_fit_one_launch_are_refused() -> None:
    shape = (3, 4, 2, 8)
    good = (torch.zeros(shape), torch.zeros(shape))
    for bad, message in (
        (torch.zeros(4, 4, 2, 8), r"value cache of late layer 1 has shape \(4, 4, 2, 8\)"),
        (torch.zeros(3, 2, 4, 8).transpose(1, 2), "value cache of late layer 1 has strides"),
        (torch.zeros(shape, dtype=torch.bfloat16), "value cache of late layer 1 has dtype torch.bfloat16"),
        (torch.zeros(shape, device="meta"), "value cache of late layer 1 has device meta"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedCaches.of([good, (good[0], bad)])
    with pytest.raises(ValueError, match="no caches given"):
        PagedCaches.of([])
    with pytest.raises(ValueError, match=r"view\(torch.float8_e4m3fn\)"):
        PagedCaches.of([(torch.zeros(shape, dtype=torch.uint8),) * 2])
    with pytest.raises(ValueError, match="last dimension contiguous"):
        PagedCaches.of([(good[0].transpose(2, 3),) * 2])
    eight = (good[0].to(FP8), good[1].to(FP8))
    with pytest.raises(ValueError, match="need one k_scale and one v_scale for each of 1 layers"):
        PagedCaches.of([eight], [1.0])
    with pytest.raises(ValueError, match="positive and finite"):
        PagedCaches.of([eight], [1.0], [0.0])
    with pytest.raises(ValueError, match="hold no scaled values"):
        PagedCaches.of([good], [1.0], [1.0])


def test_arguments_that_do_not_fit_the_caches_are_refused() -> None:
    caches = PagedCaches.of([(torch.zeros(3, 4, 2, 8), torch.zeros(3, 4, 2, 8))])
    good: dict[str, Any] = {
        "late_kv": torch.zeros(5, 32),
        "positions": torch.zeros(5, dtype=torch.int64),
        "cos_sin_cache": torch.zeros(9, 8),
        "slot_mapping": torch.zeros(4, dtype=torch.int64),
        "k_norm_weight": torch.zeros(1, 8),
    }

    def write(**changes: Any) -> None:
        late_kv_reference.write_late_kv(**{**good, **changes}, caches=caches, is_neox_style=True)

    write()
    write(positions=good["positions"][:4])
    for argument, bad, message in (
        ("late_kv", torch.zeros(5, 33), r"late_kv has shape \(5, 33\)"),
        ("late_kv", torch.zeros(32, 5).t(), "contiguous along a row"),
        ("late_kv", good["late_kv"].half(), "torch.float16, which does not go into a torch.float32 cache"),
        ("positions", good["positions"][:3], r"positions is torch.int64 of shape \(3,\)"),
        ("positions", good["positions"].int(), "positions is torch.int32"),
        ("slot_mapping", good["slot_mapping"].int(), "slot_mapping is torch.int32"),
        ("cos_sin_cache", torch.zeros(9, 10), "rotary_dim of at most 8"),
        ("k_norm_weight", torch.zeros(2, 8), r"k_norm_weight has shape \(2, 8\)"),
        ("cos_sin_cache", torch.zeros(9, 8, device="meta"), "cos_sin_cache is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            write(**{argument: bad})
