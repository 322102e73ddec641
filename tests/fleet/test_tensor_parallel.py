"""Tensor parallelism on both sides, equal and unequal: each worker pulls its own heads."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from harness import SUITE, Fleet, prompt, request, running, spec

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


@pytest.mark.parametrize(("prefill", "decode"), [(2, 2), (2, 1)])
async def test_answers_are_one_engines(model: Path, tmp_path: Path, prefill: int, decode: int) -> None:
    wanted = spec(model, tmp_path / "logs")
    for role, size in (("prefill", prefill), ("decode", decode)):
        engine = wanted["pools"][role]["engine"]
        engine["tensor_parallel_size"] = size
        # With four spinning workers on two cores some reads stall; see the limits in docs/disaggregation.md.
        engine["kv_transfer_config"]["kv_connector_extra_config"] = {"suite": {**SUITE, "pull_timeout_s": 3.0}}
    with running(tmp_path, wanted) as process:
        async with aiohttp.ClientSession() as session:
            fleet = Fleet(process, tmp_path / "logs", session)

            async def pull(tokens: int, seed: int) -> None:
                # Not through the router: eight busy processes on two cores can be late for its polls.
                text = prompt(tokens, seed)
                alone = await fleet.post(request(text), "decode")
                first = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json
                pulled = await fleet.post(request(text, kv_transfer_params=first["kv_transfer_params"]), "decode")
                assert pulled.tokens == alone.tokens

            for index, tokens in enumerate((100, 5, 64, 300, 700, 100)):
                await pull(tokens, 80 + index)
            pulled = await fleet.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok")
            # A stalled read or an unanswered claim is recomputed: counted, never lost.
            recomputed = await fleet.metric("decode", "vllm_suite_kv_recomputes_total")
            assert pulled >= 1
            assert pulled + recomputed == 6
            await fleet.idle()
