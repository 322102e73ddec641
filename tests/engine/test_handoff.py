"""What decode computes from pulled KV is what it computes alone, and a bad reference never changes it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from child import free_blocks, scheduler
from pair import SUITE, Pair
from pd import PREFILL_PARAMS, prompt

from vllm_disagg.fence import remote_params
from vllm_suite.handoff import Refusal


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 64, 500, 1500])
def test_decode_equals_a_single_engine(pair: Pair, tokens: int) -> None:
    text = prompt(tokens, tokens)
    alone = pair.d.generate(text, max_tokens=16)
    before = pair.pulls("ok")
    pulled = pair.d.generate(text, pair.p.prefill(text), max_tokens=16)
    assert pulled.tokens == alone.tokens
    assert pair.pulls("ok") == before + 1


def test_the_bytes_pulled_are_the_bytes_nixl_moved(pair: Pair) -> None:
    def counted() -> list[float]:
        return [
            pair.d.metric("vllm_suite_kv_pull_bytes_total", peer="p", direction="in"),
            pair.d.metric("vllm:nixl_bytes_transferred_sum"),
            pair.p.metric("vllm_suite_kv_pull_bytes_total", peer="d", direction="out"),
        ]

    text = prompt(300, 7)
    before = counted()
    pair.d.generate(text, pair.p.prefill(text))
    pair.wait_free()
    # 10 blocks of 32 tokens, 4 layers, 2 KV heads, keys and values, 64 numbers of 4 bytes.
    assert [after - b for after, b in zip(counted(), before, strict=True)] == [10 * 32 * 4 * 2 * 2 * 64 * 4] * 3


def test_eight_at_once(pair: Pair) -> None:
    texts = [prompt(40 + 37 * i, 100 + i) for i in range(8)]
    alone = [pair.d.generate(text).tokens for text in texts]
    references = [pair.p.prefill(text) for text in texts]
    before = pair.pulls("ok")
    pulled = pair.d.generate_many(list(zip(texts, references, strict=True)))
    assert [result.tokens for result in pulled] == alone
    assert pair.pulls("ok") == before + 8


def test_direction_is_per_request(pair: Pair) -> None:
    text = prompt(200, 8)
    alone = pair.p.generate(text)
    assert pair.p.generate(text, pair.d.prefill(text)).tokens == alone.tokens
    assert pair.p.metric("vllm_suite_kv_pulls_total", outcome="ok") >= 1


# Each entry changes a good reference; the consumer must name the reason and answer correctly all the same.
def _strip_fence(kv: dict[str, Any]) -> None:
    del kv["suite"]


def _other_blocks(kv: dict[str, Any]) -> None:
    kv["remote_block_ids"] = [[block + 1 for block in kv["remote_block_ids"][0]]]


def _out_of_range_blocks(kv: dict[str, Any]) -> None:
    kv["remote_block_ids"] = [[10**6 for _ in kv["remote_block_ids"][0]]]


def _forged_blocks(kv: dict[str, Any]) -> None:
    """Other blocks, and a location that fits them: only the producer can tell."""
    _other_blocks(kv)
    remote = remote_params(kv)
    assert not isinstance(remote, Refusal)
    kv["suite"]["location"] = remote.location()


def _fewer_blocks(kv: dict[str, Any]) -> None:
    kv["remote_block_ids"] = [kv["remote_block_ids"][0][:-1]]


def _fewer_tokens(kv: dict[str, Any]) -> None:
    kv["suite"]["tokens"] -= 32


def _other_epoch(kv: dict[str, Any]) -> None:
    kv["suite"]["epoch"] = "0" * 16


def _other_producer(kv: dict[str, Any]) -> None:
    kv["suite"]["producer"] = "somebody"


def _other_model(kv: dict[str, Any]) -> None:
    kv["suite"]["model"] = "0" * 32


def _other_layout(kv: dict[str, Any]) -> None:
    kv["suite"]["layout"] = "0" * 32


def _never_issued(kv: dict[str, Any]) -> None:
    kv["remote_request_id"] = kv["suite"]["request_id"] = "cmpl-never"
    remote = remote_params(kv)
    assert not isinstance(remote, Refusal)
    kv["suite"]["location"] = remote.location()


def _wrong_types(kv: dict[str, Any]) -> None:
    kv["remote_port"] = "5600"


def _missing_field(kv: dict[str, Any]) -> None:
    del kv["remote_engine_id"]


def _unknown_fence_field(kv: dict[str, Any]) -> None:
    kv["suite"]["extra"] = 1


def _negative_blocks(kv: dict[str, Any]) -> None:
    kv["remote_block_ids"] = [[-1]]


def _not_a_dict(kv: dict[str, Any]) -> None:
    kv["suite"] = ["nonsense"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_strip_fence, "unfenced"),
        (_other_blocks, "tampered"),
        (_out_of_range_blocks, "tampered"),
        (_forged_blocks, "tampered"),
        (_fewer_blocks, "tampered"),
        (_fewer_tokens, "truncated"),
        (_other_epoch, "stale_epoch"),
        (_other_producer, "foreign_producer"),
        (_other_model, "foreign_model"),
        (_other_layout, "foreign_layout"),
        (_never_issued, "unknown"),
        (_wrong_types, "malformed"),
        (_missing_field, "malformed"),
        (_unknown_fence_field, "malformed"),
        (_negative_blocks, "malformed"),
        (_not_a_dict, "malformed"),
    ],
)
def test_a_bad_reference_is_refused_and_recomputed(pair: Pair, change: Any, reason: str) -> None:
    text, other = prompt(150, 11), prompt(150, 12)
    alone = pair.d.generate(text)
    kv, neighbour = pair.p.prefill(text), pair.p.prefill(other)
    change(kv)
    refused, recomputed = pair.refused(reason), pair.recomputed(reason)
    assert pair.d.generate(text, kv).tokens == alone.tokens
    assert (pair.refused(reason), pair.recomputed(reason)) == (refused + 1, recomputed + 1)
    assert neighbour["remote_block_ids"] != kv["remote_block_ids"]


def test_a_reference_of_another_prompt_is_refused(pair: Pair) -> None:
    text, other = prompt(150, 13), prompt(150, 14)
    alone = pair.d.generate(text)
    kv = pair.p.prefill(other)
    before = pair.refused("foreign_content")
    assert pair.d.generate(text, kv).tokens == alone.tokens
    assert pair.refused("foreign_content") == before + 1


def test_a_reference_serves_once(pair: Pair) -> None:
    text = prompt(150, 15)
    alone = pair.d.generate(text)
    kv = pair.p.prefill(text)
    before = pair.refused("reused")
    assert pair.d.generate(text, dict(kv)).tokens == alone.tokens
    assert pair.d.generate(text, dict(kv)).tokens == alone.tokens
    assert pair.refused("reused") == before + 1


def test_two_consumers_of_one_reference_at_once(pair: Pair) -> None:
    text = prompt(150, 16)
    alone = pair.d.generate(text)
    kv = pair.p.prefill(text)
    before = pair.refused("reused")
    results = pair.d.generate_many([(text, dict(kv)), (text, dict(kv))])
    assert [r.tokens for r in results] == [alone.tokens] * 2
    assert pair.refused("reused") == before + 1


def test_a_late_pull_never_sees_reused_blocks(pair: Pair) -> None:
    """vLLM answers 200 with wrong tokens here: the lease ran out and other prompts took the blocks."""
    text = prompt(1500, 17)
    alone = pair.d.generate(text)
    kv = pair.p.prefill(text)
    pair.wait_free(SUITE["lease_s"] + 5)
    for seed in range(3):
        pair.p.generate(prompt(1500, 900 + seed))
    before = pair.refused("expired")
    assert pair.d.generate(text, kv).tokens == alone.tokens
    assert pair.refused("expired") == before + 1


def test_blocks_nobody_fetches_are_freed_when_the_lease_ends(pair: Pair) -> None:
    before = pair.p.metric("vllm_suite_kv_leases_total", end="expired")
    begun = time.monotonic()
    pair.p.prefill(prompt(500, 18))
    assert pair.p.call(free_blocks) < pair.p_free
    pair.wait_free(SUITE["lease_s"] + 5)
    assert time.monotonic() - begun >= SUITE["lease_s"]
    assert pair.p.metric("vllm_suite_kv_leases_total", end="expired") == before + 1


def test_a_waiting_request_keeps_its_lease(pair: Pair) -> None:
    """The claim is renewed while the consumer cannot start the pull, long past the lease."""
    text = prompt(150, 19)
    alone = pair.d.generate(text)
    kv = pair.p.prefill(text)
    before = pair.pulls("ok")
    waited = pair.d.call(_pull_late, text, kv, 2.5 * SUITE["lease_s"])
    assert waited == alone.tokens
    assert pair.pulls("ok") == before + 1


def _pull_late(llm: Any, text: list[int], kv: dict[str, Any], seconds: float) -> list[int]:
    from pd import _generate

    half = scheduler(llm).connector.connector_scheduler
    original, opens = half.get_num_new_matched_tokens, time.monotonic() + seconds

    def closed_until(request: Any, computed: int) -> tuple[int | None, bool]:
        return original(request, computed) if time.monotonic() >= opens else (None, False)

    half.get_num_new_matched_tokens = closed_until
    try:
        return _generate(llm, text, kv, 8).tokens
    finally:
        half.get_num_new_matched_tokens = original


def test_an_abandoned_request_gives_its_lease_back(pair: Pair) -> None:
    kv = pair.p.prefill(prompt(500, 20))
    before = pair.p.metric("vllm_suite_kv_leases_total", end="released")
    begun = time.monotonic()
    pair.d.call(_abort_before_schedule, prompt(500, 20), kv)
    pair.wait_free(SUITE["lease_s"] + 5)
    assert time.monotonic() - begun < SUITE["lease_s"]
    assert pair.p.metric("vllm_suite_kv_leases_total", end="released") == before + 1


def _abort_before_schedule(llm: Any, text: list[int], kv: dict[str, Any]) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=8, extra_args={"kv_transfer_params": kv})
    llm.llm_engine.add_request("gone", {"prompt_token_ids": text}, params)
    time.sleep(0.05)
    llm.llm_engine.abort_request(["gone"])


def test_a_prefill_request_cannot_make_the_engine_pull(pair: Pair) -> None:
    """Upstream parks a request with do_remote_decode and remote block ids for ever."""
    text = prompt(150, 21)
    kv = {**pair.p.prefill(prompt(400, 22)), **PREFILL_PARAMS}
    assert kv["remote_block_ids"]
    assert pair.d.generate(text, kv, 1, timeout_s=20).kv is not None


def test_transfer_params_that_say_nothing_are_ignored(pair: Pair) -> None:
    text = prompt(50, 23)
    alone = pair.d.generate(text)
    for kv in ({}, {"do_remote_prefill": False}, {"remote_block_ids": [[1]]}, {"do_remote_prefill": "yes"}):
        assert pair.d.generate(text, dict(kv)).tokens == alone.tokens


def test_descriptor_ids_are_upstreams(pair: Pair) -> None:
    text = prompt(100, 24)
    pair.d.generate(text, pair.p.prefill(text))
    assert pair.d.call(_compare_descriptor_ids) == 20


def _compare_descriptor_ids(llm: Any) -> int:
    import random

    import numpy as np
    from test_transfer_faults import worker

    from vllm_disagg.worker import SuitePullWorker

    half, rng, equal = worker(llm), random.Random(1), 0
    for engine_id, blocks in half.dst_num_blocks.items():
        regions = half.dst_region_num_blocks.get(engine_id) or None
        for _ in range(10):
            ids = [[rng.randrange(blocks) for _ in range(rng.randrange(0, 60))]]
            geometry = {"dst_num_blocks": blocks, "block_size_ratio": None, "physical_blocks_per_logical": 1}
            geometry["region_num_blocks"] = regions
            ours = half._compute_desc_ids(block_ids=ids, **geometry)
            theirs = super(SuitePullWorker, half)._compute_desc_ids(block_ids=ids, **geometry)
            equal += bool(np.array_equal(ours, theirs))
    return equal
