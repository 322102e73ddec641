"""The cost of a step by hand, for one batch and for arrays of them."""

from __future__ import annotations

import pytest

from vllm_suite.planner.latency import AffineSteps, Batch


def test_affine_steps_and_their_arrays() -> None:
    numpy = pytest.importorskip("numpy")
    steps = AffineSteps(step=9e-3, per_sequence=20e-6, per_kv_token=22e-9, per_prefill_token=22e-6)
    assert steps.step_seconds(Batch(100, 3, 1000)) == pytest.approx(9e-3 + 60e-6 + 22e-6 + 2200e-6)
    many = Batch(numpy.array([100, 0]), numpy.array([3, 1]), numpy.array([1000, 10]))
    assert list(steps.step_seconds(many)) == [
        steps.step_seconds(Batch(100, 3, 1000)),
        steps.step_seconds(Batch(0, 1, 10)),
    ]
    with pytest.raises(ValueError, match="per_sequence is a time in seconds"):
        AffineSteps(step=1, per_sequence=-1, per_kv_token=0, per_prefill_token=0)
    with pytest.raises(ValueError, match="step is a time in seconds"):
        AffineSteps(step=0, per_sequence=0, per_kv_token=0, per_prefill_token=0)
