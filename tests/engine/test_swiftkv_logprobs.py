"""Log-probabilities of prompts: exact where every layer computes every token, refused where the skip is armed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import swiftkv_engine as se
from swiftkv_engine import Ask, tokens


def test_unarmed_they_are_the_references(checkpoint: Callable[..., Path]) -> None:
    """Through chunks, in one batch with others, and with 0 asked for: the prompt's own tokens, as scoring needs."""
    model = checkpoint("llama", layers=8, cut=4, group=2)
    asks = [
        Ask(tokens(200), max_tokens=1, prompt_logprobs=0),
        Ask(tokens(70, 1), max_tokens=3, prompt_logprobs=4),
        Ask(tokens(40, 2), max_tokens=5),
        Ask(tokens(200), max_tokens=1, prompt_logprobs=0, at=8),
    ]
    with se.engine(model, armed=False, budget=64) as engine:
        report = engine.run(asks)
    se.compare(model, asks, report)
    se.skipped_nothing(report)
    scores = report.answers[0].prompt_logprobs
    assert scores is not None
    assert len(scores) == 200
    plain = se.logprobs(se.reference(model), asks[0].prompt)
    own = [row[token] for row, token in zip(scores[1:], asks[0].prompt[1:], strict=True) if row]
    expected = sum(plain[i, token].item() for i, token in enumerate(asks[0].prompt[1:]))
    assert sum(own) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("count", [0, 1])
def test_armed_they_are_refused(armed_and_guarded: se.Engine, count: int) -> None:
    """With the reason, before anything is computed; the engine goes on."""
    ask = Ask(tokens(40), max_tokens=2)
    with pytest.raises(se.EngineError) as error:
        armed_and_guarded.run([replace(ask, prompt_logprobs=count)])
    assert error.value.kind == "VLLMValidationError"
    assert "--no-kv-sharing-fast-prefill" in error.value.text
    assert len(armed_and_guarded.run([ask]).answers[0].tokens) == 2


@pytest.fixture(scope="module")
def armed_and_guarded(checkpoint: Callable[..., Path]) -> Any:
    with se.engine(checkpoint("llama", layers=8, cut=4, group=2), prepare=guard) as engine:
        yield engine


def guard() -> None:
    """As the plugin's settings do in every process that serves."""
    from vllm_suite.compat import prompt_logprobs

    prompt_logprobs.install()
