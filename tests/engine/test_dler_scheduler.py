"""The length-aware scheduler in real engines: every request gets the answer that stock vLLM gives, in another order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from child import scheduler
from dler_engine import AHEAD, OURS, STOCK, Answer, Ask, DlerEngine, Spec, engines

SHORT, LONG = 6, 60
LENGTHS = {"short": SHORT, "long": LONG}
SETTINGS = {"rule": "kappa", "kappa": 1.0, "caps": {"capped": 5}, "victims": {"min_run": 4}}
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


def test_when_the_cache_is_full_the_answers_stay(stock: DlerEngine, ours: DlerEngine) -> None:
    """Four long requests grow past the cache: both evict, each its own way, and compute again."""
    asks = [Ask(400 + 9 * n, 200 + n, "long" if n % 2 else "short", 150) for n in range(6)]
    before = ours.call(_evictions)
    assert said(ours.ask(asks)) == said(stock.ask(asks))
    after = ours.call(_evictions)
    assert after.get("kv_full", 0) > before.get("kv_full", 0)
    assert "unforeseen" not in after


def test_aborts_of_waiting_and_running_requests(stock: DlerEngine, ours: DlerEngine) -> None:
    asks = mixed()
    gone = {0: 3, 5: 1, 7: 2, 11: 5}
    theirs, mine = stock.ask(asks), ours.ask(asks, gone)
    for number, (whole, got) in enumerate(zip(theirs, mine, strict=True)):
        assert got is None or got.tokens == whole.tokens  # type: ignore[union-attr]
        assert (got is None) <= (number in gone)
    assert sum(got is None for got in mine) >= 2


def test_all_running_ones_are_sent_back(stock: DlerEngine, ours: DlerEngine) -> None:
    before = ours.call(_evictions).get("reset", 0)
    asks = mixed()
    assert said(ours.ask(asks, reset_after=9)) == said(stock.ask(asks))
    assert ours.call(_evictions)["reset"] > before


def test_samples(stock: DlerEngine, ours: DlerEngine) -> None:
    sampled = {"n": 3, "temperature": 1.0, "seed": 5}
    asks = [Ask(50 + n, 300 + n, "long", 12, options=sampled) for n in range(3)] + mixed(4)
    theirs, mine = stock.ask(asks), ours.ask(asks)
    assert said(mine) == said(theirs)
    assert all(answer and len(answer.tokens) == 3 for answer in mine[:3])


@pytest.mark.parametrize("enough", [1, 2])
def test_k_of_n(stock: DlerEngine, ours: DlerEngine, enough: int) -> None:
    """Four places and seven samples: some of those that are no longer wanted have never begun."""
    ends = list(range(16, 60))
    sampled = {"n": 7, "temperature": 1.0, "seed": 11, "stop_token_ids": ends}
    whole = stock.ask([Ask(40, 400, max_tokens=400, options=sampled)])[0]
    part = ours.ask([Ask(40, 400, max_tokens=400, options=sampled, xargs={"dler_stop_after": enough})])[0]
    assert whole is not None
    assert part is not None
    assert whole.reasons == ["stop"] * 7
    assert enough <= part.reasons.count("stop") < 7
    assert set(part.reasons) == {"stop", "length"}
    assert [] in part.tokens
    for got, all_ in zip(part.tokens, whole.tokens, strict=True):
        assert got == all_[: len(got)]


def test_priorities_go_first(stock: DlerEngine, ours: DlerEngine) -> None:
    asks = [Ask(30, 500 + n, "short", SHORT, priority=3 - n // 4) for n in range(12)]
    mine = ours.ask(asks)
    assert said(mine) == said(stock.ask(asks))
    by_priority = {
        p: [a.place for a, ask in zip(mine, asks, strict=True) if a and ask.priority == p] for p in (1, 2, 3)
    }
    assert max(by_priority[1]) < min(by_priority[2])
    assert max(by_priority[2]) < min(by_priority[3])


def test_structured_output(stock: DlerEngine, ours: DlerEngine) -> None:
    asks = [Ask(30 + n, 600 + n, "short", 12, options={"choice": ["yes", "no"], "ignore_eos": False}) for n in range(6)]
    asks += mixed(4)
    theirs, mine = stock.ask(asks), ours.ask(asks)
    assert said(mine) == said(theirs)
    assert all(answer and answer.reasons == ["stop"] for answer in mine[:6])


def test_a_cap_ends_its_class(stock: DlerEngine, ours: DlerEngine) -> None:
    asks = [Ask(30, 700, "capped", 20), Ask(30, 701, "other", 20)]
    theirs, mine = stock.ask(asks), ours.ask(asks)
    assert mine[0] is not None
    assert theirs[0] is not None
    assert (mine[0].tokens[0], mine[0].reasons) == (theirs[0].tokens[0][:5], ["length"])
    assert mine[1] == theirs[1] or (mine[1] and theirs[1] and mine[1].tokens == theirs[1].tokens)


def test_lengths_are_learned_from_answers_that_end(stock: DlerEngine, ours: DlerEngine) -> None:
    [free] = stock.ask([Ask(33, 800, max_tokens=12)])
    assert free is not None
    tokens = free.tokens[0]
    last = next(n for n in range(5, 12) if tokens[n] not in tokens[:n])
    options = {"stop_token_ids": [tokens[last]]}
    ours.ask([Ask(33, 800, "learned", 12, options=options) for _ in range(20)])
    # What all other requests took still has a little say.
    assert last + 1 <= ours.call(_expected, "class:learned", 1000) < ours.call(_expected, "class:other", 1000) / 2


@pytest.fixture(scope="module")
def others(model: Path) -> Iterator[list[DlerEngine]]:
    """Ours over the scheduler that runs ahead, with prefix caching, the gate and kappa that adapts; and stock."""
    more = {"enable_prefix_caching": True}
    suite = SETTINGS | {"adaptive": {"enabled": True, "maximum": 1.0, "period_s": 0.01}, "gate": {"enabled": True}}
    with engines(Spec("stock-2", model, STOCK, llm=more), Spec("ahead", model, AHEAD, suite, more)) as both:
        both[1].call(_teach, LENGTHS)
        yield both


@pytest.mark.slow
def test_over_the_scheduler_that_runs_ahead(others: list[DlerEngine]) -> None:
    stock, ahead = others
    assert ahead.call(_class_name) == "LengthAwareAsyncScheduler"
    asks = mixed()
    theirs, mine = stock.ask(asks), ahead.ask(asks)
    assert said(mine) == said(theirs)
    assert max(places(mine, asks, "short")) < min(places(mine, asks, "long"))
    full = [Ask(400 + 9 * n, 200 + n, "long" if n % 2 else "short", 150) for n in range(6)]
    assert said(ahead.ask(full)) == said(stock.ask(full))
    assert ahead.call(_remembered) == 0


@pytest.mark.slow
def test_cached_prompts_are_no_work(others: list[DlerEngine]) -> None:
    """Behind a running batch, a long prompt that is cached goes before one that is not."""
    stock, ahead = others
    warm = Ask(640, 900, "short", SHORT, shared=600)
    ahead.ask([warm])
    busy = [Ask(30 + n, 910 + n, "short", 20) for n in range(4)]
    cold = Ask(640, 920, "short", SHORT)
    again = Ask(640, 921, "short", SHORT, shared=600)
    asks = [*busy, cold, again]
    theirs, mine = stock.ask(asks), ahead.ask(asks)
    assert said(mine) == said(theirs)
    assert mine[5] is not None
    assert mine[4] is not None
    assert mine[5].place < mine[4].place


def _teach(llm: Any, lengths: dict[str, int]) -> None:
    known = scheduler(llm).length_policy.lengths
    for name, tokens in lengths.items():
        for _ in range(300):
            known.observe([f"class:{name}"], tokens)


def _expected(llm: Any, key: str, cap: int) -> float:
    found: float = scheduler(llm).length_policy.lengths.remaining([key], 0, cap)
    return found


def _evictions(llm: Any) -> dict[str, float]:
    rows = scheduler(llm).length_policy.report()["counters"].get("evictions", [])
    return {labels[0]: count for labels, count in rows}


def _class_name(llm: Any) -> str:
    return type(scheduler(llm)).__name__


def _remembered(llm: Any) -> int:
    policy = scheduler(llm).length_policy
    return len(policy._states) + len(policy.placement.groups) + len(policy.waits)


def _free_blocks(llm: Any) -> int:
    return int(scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks())
