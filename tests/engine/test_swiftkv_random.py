"""Random requests at random times on running engines, equal to the plain reference whatever came before."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import swiftkv_engine as se
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from swiftkv_engine import BLOCK, Ask, tokens
from test_swiftkv_matrix import NGRAM, check

# A prompt is the beginning of one of two long texts, so that prompts share prefixes, and a part of its own.
_near_blocks = st.builds(lambda n, off: n * BLOCK + off, st.integers(1, 9), st.integers(-1, 1))
_lengths = st.one_of(st.integers(1, 300), _near_blocks)
_ask = st.builds(
    lambda text, shared, own, at, count: Ask(tokens(400, text)[:shared] + tokens(own, at), max_tokens=count, at=at),
    text=st.integers(100, 101),
    shared=_lengths,
    own=st.integers(0, 60),
    at=st.integers(0, 12),
    count=st.integers(1, 30),
)
_batches = st.lists(_ask, min_size=1, max_size=7)


@functools.cache
def fuzz(examples: int) -> Any:
    def decorate(function: Any) -> Any:
        wrapped = given(asks=_batches)(function)
        health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
        return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=health)(wrapped)

    return decorate


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Any:
    """One engine with chunks, prefix cache and few blocks. They stay as earlier examples left them."""
    model = checkpoint("qwen3", layers=9, cut=3, group=2)
    with se.engine(model, budget=48, blocks=24) as engine:
        yield model, engine


@fuzz(25)
def test_random_requests(running: Any, asks: list[Ask]) -> None:
    model, engine = running
    check(model, engine, asks, armed=True)


@pytest.mark.slow
@fuzz(400)
def test_many_random_requests(running: Any, asks: list[Ask]) -> None:
    model, engine = running
    check(model, engine, asks, armed=True)


@pytest.fixture(scope="module", params=[True, False], ids=["armed", "unarmed"])
def drafting(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Any:
    model = checkpoint("qwen2", layers=8, cut=4, group=4)
    llm = {"speculative_config": NGRAM}
    with se.engine(model, armed=request.param, budget=40, blocks=24, llm=llm) as engine:
        yield model, engine, request.param


@pytest.mark.slow
@fuzz(150)
def test_many_random_requests_with_drafts(drafting: Any, asks: list[Ask]) -> None:
    model, engine, armed = drafting
    check(model, engine, asks, armed)
