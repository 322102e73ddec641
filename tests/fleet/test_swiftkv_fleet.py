"""A fleet with a prefill-only pool, as a user writes it: right answers, skipped tokens at /metrics, no garbage."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import aiohttp
from harness import SUITE, Fleet, prompt, request, running, spec, transfer
from reference_swiftkv import load
from swiftkv_checkpoints import make_swiftkv_checkpoint

REQUESTS = 12


async def test_prompts_of_a_prefill_only_pool_decode_to_the_references_answers(tmp_path: Path) -> None:
    model = make_swiftkv_checkpoint(tmp_path / "model", "llama", layers=8, cut=4, group=2)
    wanted = spec(model, tmp_path / "logs") | {"plugins": ["disagg", "swiftkv"]}
    patient = {**SUITE, "claim_timeout_s": 2.0}
    for role in ("prefill", "decode"):
        config = transfer(role) | {"kv_connector_extra_config": {"suite": patient}}
        wanted["pools"][role]["engine"]["kv_transfer_config"] = config
    wanted["pools"]["prefill"]["engine"]["additional_config"] = {"suite": {"swiftkv": {"prefill_only": True}}}
    rng = random.Random(11)
    prompts = [prompt(rng.randrange(1, 600), seed) for seed in range(REQUESTS)]
    reference = load(model)
    answers = [reference.greedy(text, 8) for text in prompts]
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)
            await fleet.ready("prefill")
            await fleet.ready("decode")
            got = await asyncio.gather(*(fleet.post(request(text)) for text in prompts))
            assert [answer.tokens for answer in got] == answers
            assert await fleet.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok") == REQUESTS

            refused = await fleet.post(request(prompts[0]), "prefill")
            assert refused.status == 400
            assert "only computes prompts for others" in refused.text
            state = (await fleet.get("prefill", "/suite/v1/state", "control-key")).json
            assert state["prefill_only"] is True

            # The exporter reads the workers once in a while.
            for _ in range(100):
                skipped = await fleet.metric("prefill", "vllm_suite_swiftkv_skipped_tokens_total")
                if skipped >= sum(map(len, prompts)):
                    break
                await asyncio.sleep(0.1)
            assert skipped == sum(map(len, prompts))
            assert await fleet.metric("prefill", "vllm_suite_swiftkv_tail_rows_total") == 0
            await fleet.idle()
