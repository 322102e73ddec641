"""The length-aware scheduler in real engines: every request gets the answer that stock vLLM gives, in another order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dler_engine import OURS, STOCK, Answer, Ask, DlerEngine, Spec, engines, scheduler

SHORT, LONG = 6, 60
LENGTHS = {"short": SHORT, "long": LONG}
SETTINGS = {"kappa": 1.0, "caps": {"capped": 5}, "victims": {"min_run": 4}}
PRIORITY = {"scheduling_policy": "priority"}


@pytest.fixture(scope="module")
def both(model: Path) -> Iterator[tuple[DlerEngine, DlerEngine]]:
    """Stock vLLM and ours, four places each; ours knows how long answers of two classes are."""
    with engines(Spec("stock", model, STOCK), Spec("ours", model, OURS, SETTINGS, PRIORITY)) as (stock, ours):
        ours.call(_teach, LENGTHS)
        yield stock, ours


@pytest.fixture
def ours(both: tuple[DlerEngine, DlerEngine]) -> Iterator[DlerEngine]:
    """After the test no request is remembered and no block is missing."""
    before = both[1].call(_free_blocks)
    yield both[1]
    assert both[1].call(_remembered) == 0
    assert both[1].call(_free_blocks) == before


def mixed(count: int = 12) -> list[Ask]:
    """Long requests first, short ones behind them."""
    half = count // 2
    asks = [Ask(40 + n, n, "long", LONG) for n in range(half)]
    return asks + [Ask(30 + n, 100 + n, "short", SHORT) for n in range(half)]


def said(answers: list[Answer | None]) -> list[Any]:
    return [answer and (answer.tokens, answer.reasons) for answer in answers]


def places(answers: list[Answer | None], asks: list[Ask], name: str) -> list[int]:
    return [answer.place for answer, ask in zip(answers, asks, strict=True) if answer and ask.name == name]


def test_answers_are_stock_vllms_and_short_ones_come_first(stock: DlerEngine, ours: DlerEngine) -> None:
    asks = mixed()
    theirs, mine = stock.ask(asks), ours.ask(asks)
    assert said(mine) == said(theirs)
    assert all(answer and len(answer.tokens[0]) == ask.max_tokens for answer, ask in zip(mine, asks, strict=True))
    assert max(places(mine, asks, "short")) < min(places(mine, asks, "long"))
    assert min(places(theirs, asks, "short")) > min(places(theirs, asks, "long"))


@pytest.fixture
def stock(both: tuple[DlerEngine, DlerEngine]) -> DlerEngine:
    return both[0]


def _teach(llm: Any, lengths: dict[str, int]) -> None:
    known = scheduler(llm).length_policy.lengths
    for name, tokens in lengths.items():
        for _ in range(300):
            known.observe([f"class:{name}"], tokens)


def _remembered(llm: Any) -> int:
    policy = scheduler(llm).length_policy
    return len(policy._states) + len(policy._groups)


def _free_blocks(llm: Any) -> int:
    return int(scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks())
