"""The arithmetic of distillation: right loss, right gradient, one run of the head, and never all logits at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_swiftkv.distill.loss import BUFFERS, cross_entropies, distillation_loss, tile_tokens
from vllm_swiftkv.distill.rows import Batch
from vllm_swiftkv.distill.student import Student
from vllm_swiftkv.families import SwiftKVError
from vllm_swiftkv.hf.checkpoint import load

T = 2.0


def plain_loss(student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The published loss, all logits at once."""
    q, p = ((h @ head.t()) / T for h in (student, teacher))
    return F.kl_div(F.log_softmax(q, -1), F.log_softmax(p, -1), log_target=True, reduction="sum") * T**2


class Peak(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def hidden(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("tile", [1, 3, 7, 20])
def test_tiles_give_the_loss_and_its_gradient(tile: int) -> None:
    head, teacher = hidden(50, 0), hidden(7, 1)
    ours, plain = (hidden(7, 2).requires_grad_() for _ in range(2))
    loss = distillation_loss(ours, teacher, head, T, tile)
    expected = plain_loss(plain, teacher, head)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-6)


def test_no_tokens_no_loss() -> None:
    nothing = torch.zeros(0, 16, requires_grad=True)
    loss = distillation_loss(nothing, torch.zeros(0, 16), torch.randn(50, 16), T, 4)
    loss.backward()
    assert loss.item() == 0


def test_a_head_that_trains_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        distillation_loss(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(9, 4, requires_grad=True), T, 1)


def test_cross_entropies_are_those_of_torch() -> None:
    head, labels = hidden(50, 0).float(), torch.arange(7)
    student, teacher = hidden(7, 1).float(), hidden(7, 2).float()
    got = cross_entropies(student, teacher, labels, head, 3)
    for value, states in zip(got, (student, teacher), strict=True):
        torch.testing.assert_close(value, F.cross_entropy(states @ head.t(), labels, reduction="sum"))


def test_a_tile_stays_within_its_memory() -> None:
    assert tile_tokens(512, 128_256) == (512 << 20) // (4 * 128_256 * BUFFERS)
    assert tile_tokens(1, 10**9) == 1


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Any:
    return load(checkpoint("llama", num_hidden_layers=4, std=0.1), cut=1)


def a_batch(seed: int = 0, length: int = 24, rows: int = 2) -> Batch:
    rng = random.Random(seed)
    ids = torch.tensor([[rng.randrange(16, 500) for _ in range(length)] for _ in range(rows)])
    real = torch.ones_like(ids, dtype=torch.bool)
    real[1, length - 5 :] = False
    learn = real.clone()
    learn[:, :8] = False
    learn[:, -1] = False
    positions = torch.arange(length).repeat(rows, 1)
    positions[1, length - 5 :] -= length - 5
    return Batch(ids, positions, ids.roll(-1, 1), learn, real)


def test_the_pass_is_the_published_loss_of_two_separate_runs(model: Any) -> None:
    student, batch = Student(model, T, 64), a_batch()
    with torch.no_grad():
        runs = [
            model.tail(model.head(batch.ids, batch.positions), swiftkv=True),
            model.tail(model.head(batch.ids, batch.positions), swiftkv=False),
        ]
        out = student(batch, measure=True)
    ours, theirs = (run.last[batch.learn] for run in runs)
    torch.testing.assert_close(out["kl"], plain_loss(ours, theirs, model.lm_head.weight))
    per_token = F.mse_loss(runs[0].penultimate, runs[1].penultimate, reduction="none").mean(-1)
    torch.testing.assert_close(out["mse"], per_token[batch.real].sum())
    labels = batch.labels[batch.learn]
    for name, states in (("student", ours), ("teacher", theirs)):
        torch.testing.assert_close(out[name], F.cross_entropy(model.lm_head(states), labels, reduction="sum"))
    assert out["kl"] > 0
    assert out["mse"] > 0


def test_only_the_student_gets_gradients_and_all_of_it(model: Any) -> None:
    student = Student(model, T, 64)
    out = student(a_batch())
    (out["kl"] + out["mse"]).backward()
    own = set(model.student_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in own)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in own), name
    student.zero_grad()


def test_padding_changes_nothing(model: Any) -> None:
    student, batch = Student(model, T, 64), a_batch()
    longer = Batch(
        *(F.pad(t, (0, 6)) for t in (batch.ids, batch.positions, batch.labels, batch.learn, batch.real)),
    )
    longer.positions[:, -6:] = torch.arange(6)
    with torch.no_grad():
        one, other = student(batch, measure=True), student(longer, measure=True)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-4)


def test_the_head_runs_once(model: Any) -> None:
    student, runs = Student(model, T, 64), []
    hooks = [layer.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, layer in enumerate(model.model.layers)]
    student(a_batch())
    for hook in hooks:
        hook.remove()
    assert runs == [0, 1, 2, 3, 1, 2, 3]


def test_logits_of_all_tokens_never_exist(model: Any) -> None:
    batch, vocabulary = a_batch(length=60, rows=12), model.config.vocab_size
    student = Student(model, T, 1)
    student.tile = 16
    with Peak() as peak:
        out = student(batch, measure=True)
        (out["kl"] + out["mse"]).backward()
    student.zero_grad()
    largest_else = batch.ids.numel() * model.config.intermediate_size
    assert peak.elements <= largest_else < batch.learn.sum() * vocabulary
    with Peak() as peak:
        states = torch.randn(4000, 16, requires_grad=True)
        distillation_loss(states, torch.randn(4000, 16), torch.randn(512, 16), T, 100).backward()
    assert peak.elements == max(100 * 512, 4000 * 16)


def test_what_trains_is_float32_whatever_the_rest_is(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3", num_hidden_layers=4, std=0.1)
    student = Student(load(path, cut=2, dtype=torch.bfloat16), T, 64)
    for name, parameter in student.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "_swiftkv" in name else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = student(a_batch())
    (out["kl"] + out["mse"]).backward()
    exact = Student(load(path, cut=2), T, 64)(a_batch())
    assert out["kl"].dtype == torch.float32
    torch.testing.assert_close(out["kl"], exact["kl"], rtol=0.1, atol=0)


def test_a_model_without_teacher_cannot_be_a_student(tmp_path: Path) -> None:
    from swiftkv_checkpoints import make_swiftkv_checkpoint

    with pytest.raises(SwiftKVError, match="--keep-teacher"):
        Student(load(make_swiftkv_checkpoint(tmp_path, "llama", layers=4, cut=2)), T, 64)
