"""The cost of a step by hand, for one batch and for arrays of them."""

from __future__ import annotations

import pytest
from replay_steps import AffineSteps

from vllm_suite.planner.sources.steps import Steps


def test_affine_steps_and_their_arrays() -> None:
    numpy = pytest.importorskip("numpy")
    steps = AffineSteps(step=9e-3, per_sequence=20e-6, per_kv_token=22e-9, per_prefill_token=22e-6)
    mixed = Steps.of(chunks=[(100, 50)], contexts=[400, 450])
    assert steps.step_seconds(mixed) == pytest.approx(9e-3 + 60e-6 + 22e-6 + 2200e-6)
    alone = Steps.of(contexts=[10])
    many = Steps(*(numpy.array(pair) for pair in zip(mixed, alone, strict=True)))
    assert list(steps.step_seconds(many)) == [steps.step_seconds(mixed), steps.step_seconds(alone)]
    with pytest.raises(ValueError, match="per_sequence is a time in seconds"):
        AffineSteps(step=1, per_sequence=-1, per_kv_token=0, per_prefill_token=0)
    with pytest.raises(ValueError, match="step is a time in seconds"):
        AffineSteps(step=0, per_sequence=0, per_kv_token=0, per_prefill_token=0)
