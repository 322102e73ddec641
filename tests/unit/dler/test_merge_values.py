"""What a merge computes: hand-worked numbers, ties, zeros, rounding; random models as in memory."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_models import equal, read, reference, write

from vllm_dler.merge import topk
from vllm_dler.merge.deltas import from_float32, to_float32
from vllm_dler.merge.run import Request, merge
from vllm_dler.merge.topk import quota
from vllm_suite.checkpoints.progress import Progress

# fsync on a busy disk would be most of the time.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def merged(folder: Path, base: Any, tuned: Any, **options: Any) -> Any:
    """The tensors and the report of a merge of two models given as tensors."""
    request = Request(write(folder / "base", base), write(folder / "tuned", tuned), folder / "out", **options)
    report = merge(request, Progress(io.StringIO()))
    return read(folder / "out"), report


def test_one_tensor_by_hand(tmp_path: Path) -> None:
    """Updates 0.5, -2, 0.25, 0, 1, -0.125, 4, 0: a quarter of eight is two, -2 and 4."""
    base = {"w": torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])}
    tuned = {"w": torch.tensor([[1.5, -1.0, 1.25, 1.0], [3.0, 1.875, 6.0, 2.0]])}
    result, report = merged(tmp_path, base, tuned, keep=0.25, scale=0.5)
    assert result["w"].tolist() == [[1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 4.0, 2.0]]
    assert (report["elements"], report["changed"], report["kept"]) == (8, 6, 2)


def test_the_ties_formula_by_hand(tmp_path: Path) -> None:
    """TIES merging (arXiv 2306.01708) of one model: trim to the density, elect signs, mean of those that agree, times
    lambda. With one model the elected sign is its own and the mean is itself: density 0.4 of 5 keeps 2."""
    base, tuned = [0.5, -0.25, 1.0, 0.0, -1.0], [0.75, -0.5, 0.0, 0.125, -1.75]
    trimmed = [0.0, 0.0, -1.0, 0.0, -0.75]
    elected = [1 if value >= 0 else -1 for value in trimmed]
    mean = [value if value * sign > 0 else 0.0 for value, sign in zip(trimmed, elected, strict=True)]
    expected = [b + 0.75 * m for b, m in zip(base, mean, strict=True)]
    assert expected == [0.5, -0.25, 0.25, 0.0, -1.5625]
    result, _ = merged(tmp_path, {"w": torch.tensor(base)}, {"w": torch.tensor(tuned)}, keep=0.4, scale=0.75)
    assert result["w"].tolist() == expected


def test_share_of_each_tensor_or_of_the_model(tmp_path: Path) -> None:
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    tuned = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([10.0, 20.0, 30.0, 40.0])}
    each, _ = merged(tmp_path / "each", base, tuned, keep=0.5, scale=1.0)
    assert each["a"].tolist() == [0.0, 0.0, 3.0, 4.0]
    assert each["b"].tolist() == [0.0, 0.0, 30.0, 40.0]
    whole, _ = merged(tmp_path / "whole", base, tuned, keep=0.625, scale=1.0, scope="global")
    assert whole["a"].tolist() == [0.0, 0.0, 0.0, 4.0]
    assert whole["b"].tolist() == [10.0, 20.0, 30.0, 40.0]


@pytest.mark.parametrize("piece", [1, 3, 1 << 18])
def test_equal_updates_in_the_order_of_name_and_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr("vllm_dler.merge.deltas.PIECE", piece)
    base = {name: torch.zeros(4) for name in ("b", "a10", "a9")}
    tuned = {
        "b": torch.tensor([1.0, -1.0, 1.0, 5.0]),
        "a9": torch.tensor([-1.0, 0.0, 0.0, 1.0]),
        "a10": torch.tensor([0.0, 1.0, 0.5, -1.0]),
    }
    # Five of twelve: the 5, then a10's two ones, a9's two; none of b's.
    whole, report = merged(tmp_path / "whole", base, tuned, keep=0.42, scale=1.0, scope="global")
    assert whole["b"].tolist() == [0.0, 0.0, 0.0, 5.0]
    assert whole["a9"].tolist() == [-1.0, 0.0, 0.0, 1.0]
    assert whole["a10"].tolist() == [0.0, 1.0, 0.0, -1.0]
    assert report["kept"] == 5
    # Six: b's first as well.
    more, _ = merged(tmp_path / "more", base, tuned, keep=0.5, scale=1.0, scope="global")
    assert more["b"].tolist() == [1.0, 0.0, 0.0, 5.0]
    each, _ = merged(tmp_path / "each", base, tuned, keep=0.5, scale=1.0)
    assert each["b"].tolist() == [1.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_zero_updates_are_never_taken(tmp_path: Path, scope: str) -> None:
    """Not even to fill the share; and what is not updated keeps its bits, a negative zero its sign."""
    base = {"w": torch.tensor([-0.0, 0.0, -0.0, 1.0, 7.0, 7.0, 7.0, 7.0])}
    tuned = {"w": torch.tensor([0.0, -0.0, -0.0, 3.0, 7.0, 7.0, 7.0, 7.0])}
    result, report = merged(tmp_path, base, tuned, keep=1.0, scale=0.5, scope=scope)
    assert result["w"].tolist()[3:] == [2.0, 7.0, 7.0, 7.0, 7.0]
    assert torch.signbit(result["w"][:3]).tolist() == [True, False, True]
    assert (report["changed"], report["kept"]) == (1, 1)


def test_updates_are_float32_and_rounded_once(tmp_path: Path) -> None:
    """In bfloat16 1 + 0.7 * 2^-8 would round twice; here 1.9 * 2^-8 of an update lands on the next number."""
    step = 2.0**-7  # between bfloat16 numbers at 1
    base = {"w": torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16)}
    tuned = {"w": torch.tensor([1 + step, 1 + 2 * step, 1 + 3 * step], dtype=torch.bfloat16)}
    result, _ = merged(tmp_path, base, tuned, keep=1.0, scale=0.7)
    # 0.7, 1.4 and 2.1 steps.
    assert result["w"].tolist() == [1 + step, 1 + step, 1 + 2 * step]


def test_the_share_is_the_decimal_that_was_written() -> None:
    assert int(0.29 * 100) == 28
    assert quota(0.29, 100) == 29
    assert [quota(0.25, n) for n in (0, 1, 3, 4, 7, 8)] == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_half_precision_number_there_and_back(dtype: str) -> None:
    names = {"BF16": torch.bfloat16, "F16": torch.float16}
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    theirs = patterns.view(names[dtype]).float()
    ours = torch.from_numpy(to_float32(bytearray(patterns.numpy().tobytes()), dtype))
    finite = theirs.isfinite()
    assert torch.equal(ours[finite], theirs[finite])
    assert torch.equal(ours.isfinite(), finite)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_is_torchs(dtype: str) -> None:
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    # Halfway cases of both formats among them.
    bits[::3] = bits[::3] & 0xFFFF_0000 | 0x8000
    bits[1::3] = bits[1::3] & 0xFFFF_E000 | 0x1000
    values = bits.view(np.float32)
    expected = torch.from_numpy(values.copy()).to(kind)
    finite = expected.isfinite().numpy()
    result = from_float32(values[finite], dtype)
    assert result is not None
    assert np.array_equal(result.view(np.uint8), expected[torch.from_numpy(finite)].view(torch.uint8).numpy())
    over = values[np.isfinite(values) & ~finite]
    assert over.size == 0 or from_float32(over[:1], dtype) is None


VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.0**-126, 2.0**-140, 1e30]),
    st.floats(-1e4, 1e4, width=32),
)


@st.composite
def models(draw: st.DrawFn) -> tuple[Any, Any]:
    base, tuned = {}, {}
    for name in draw(
        st.lists(st.sampled_from(["a", "a.b", "Z", "z", "layers.10", "layers.9"]), min_size=1, unique=True)
    ):
        size = draw(st.integers(0, 20))
        kinds = [draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])) for _ in range(2)]
        numbers = draw(st.lists(VALUES, min_size=size, max_size=size))
        steps = draw(st.lists(st.one_of(st.just(0.0), VALUES), min_size=size, max_size=size))
        old, step = torch.tensor(numbers, dtype=torch.float32), torch.tensor(steps, dtype=torch.float32)
        base[name] = old.clamp(-6e4, 6e4).to(kinds[0])
        tuned[name] = (old + step).clamp(-6e4, 6e4).to(kinds[1])
    return base, tuned


@settings(max_examples=60, deadline=None)
@given(
    models(),
    st.sampled_from([0.01, 0.1, 0.25, 0.5, 0.99, 1.0]),
    st.sampled_from([0.7, 1.0, 0.3]),
    st.sampled_from(["tensor", "global"]),
    st.sampled_from(["base", "tuned"]),
    st.sampled_from([1, 5, 1 << 18]),
    st.sampled_from([11, 15, 20]),
)
def test_any_model_as_in_memory(
    model: tuple[Any, Any], keep: float, scale: float, scope: str, dtype: str, piece: int, lower_bits: int
) -> None:
    base, tuned = model
    if not any((tuned[name].float() != base[name].float()).any() for name in base):
        return
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        patch.setattr("vllm_dler.merge.deltas.PIECE", piece)
        patch.setattr(topk, "LOWER_OF_TENSOR", lower_bits)
        patch.setattr(topk, "LOWER_OF_MODEL", lower_bits)
        result, report = merged(Path(folder), base, tuned, keep=keep, scale=scale, scope=scope, dtype=dtype)
    assert equal(result, reference(base, tuned, keep, scale, scope, dtype))
    assert report["changed"] == sum(int((tuned[n].float() != base[n].float()).sum()) for n in base)
