"""The decode side of a hand-over: requests whose KV has come wait for a place, and short ones get it first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair import SUITE
from pd import CALL_TIMEOUT_S, Engine, Spec, engines, prompt

OURS = "vllm_suite.compat.scheduler.make_scheduler"
SETTINGS = {"suite": {"dler": {"rule": "kappa", "kappa": 1.0}}}
SHORT, LONG = 5, 60


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[list[Engine]]:
    """A stock prefill instance, and a decode instance with two places."""
    ours = {"scheduler_cls": OURS, "additional_config": SETTINGS, "max_num_seqs": 2}
    with engines(
        Spec("p", model, suite=SUITE),
        Spec("d", model, suite=SUITE, env={"VLLM_SUITE_PLUGINS": "disagg,dler"}, llm=ours),
    ) as both:
        yield both


@pytest.mark.slow
def test_short_ones_that_have_their_kv_go_first(pair: list[Engine]) -> None:
    p, d = pair
    batch = []
    for n in range(8):
        tokens = prompt(100 + n, 1000 + n)
        short = n >= 4
        batch.append((tokens, p.prefill(tokens), "short" if short else "long", SHORT if short else LONG))
    found = d.call(_decode, batch)
    for (tokens, _, _, count), (answer, _) in zip(batch, found, strict=True):
        assert answer == p.generate(tokens, max_tokens=count).tokens
    places = [place for _, place in found]
    # Two long ones have begun before the short ones' KV comes.
    assert sorted(places[4:]) == [0, 1, 2, 3]
    assert d.metric("vllm_suite_kv_pulls_total", outcome="ok") == 8
    assert d.call(_left) == (0, 0, 0)


def _decode(llm: Any, batch: list[tuple[list[int], dict[str, Any], str, int]]) -> list[tuple[list[int], int]]:
    """Tokens of each request, and its place among those that finished."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    policy = engine.engine_core.engine_core.scheduler.length_policy
    for name, tokens in (("short", SHORT), ("long", LONG)):
        for _ in range(100):
            policy.lengths.observe([f"class:{name}"], tokens)
    for number, (tokens, kv, name, count) in enumerate(batch):
        extra = {"kv_transfer_params": kv, "dler_class": name}
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, extra_args=extra)
        engine.add_request(f"d-{number}", {"prompt_token_ids": tokens}, params)
    found: dict[int, tuple[list[int], int]] = {}
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while engine.has_unfinished_requests():
        assert time.monotonic() < deadline, sorted(found)
        for output in engine.step():
            if output.finished:
                found[int(output.request_id.rpartition("-")[2])] = list(output.outputs[0].token_ids), len(found)
    return [found[number] for number in range(len(batch))]


def _left(llm: Any) -> tuple[int, int, int]:
    policy = llm.llm_engine.engine_core.engine_core.scheduler.length_policy
    return len(policy._states), len(policy.waits), len(policy.placement.groups)
