"""What attention metadata a step of an armed engine has: two groups at most, one build where no row is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swiftkv_engine as se
from swiftkv_engine import Ask, tokens


def metadata_of_steps(llm: Any, asks: list[Ask]) -> list[tuple[bool, int | None]]:
    """Of each step: whether head and tail read one object, and the rows that the tail's describes."""
    runner, seen = se.runner(llm), []
    build = runner._build_attention_metadata

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = build(*args, **kwargs)
        head, tail = (found[0][f"model.layers.{i}.self_attn.attn"] for i in (0, 4))
        seen.append((head is tail, getattr(tail, "num_logits_indices", None)))
        return found

    runner._build_attention_metadata = watched
    try:
        se.drive(llm, asks)
    finally:
        del runner._build_attention_metadata
    return seen


def groups(llm: Any) -> list[list[str]]:
    return [group.layer_names for groups in se.runner(llm).attn_groups for group in groups]


@pytest.mark.parametrize("group", [1, 4])
def test_a_decode_step_builds_metadata_once(checkpoint: Callable[..., Path], group: int) -> None:
    model = checkpoint("llama", layers=8, cut=4, group=group)
    with se.engine(model, budget=64) as engine:
        found = engine.call(groups)
        # The second request arrives while the first decodes: a prompt alone, decodes, both in one step, decodes.
        steps = engine.call(metadata_of_steps, [Ask(tokens(20), max_tokens=6), Ask(tokens(30), max_tokens=6, at=3)])
    assert found == [
        [f"model.layers.{i}.self_attn.attn" for i in range(4)],
        [f"model.layers.{i}.self_attn.attn" for i in range(4, 8, group)],
    ]
    assert steps == [(False, 1), (True, None), (True, None), (False, 2), *[(True, None)] * 5]
