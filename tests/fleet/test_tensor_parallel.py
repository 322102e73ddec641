"""Tensor parallelism on both sides, equal and unequal: each worker pulls its own heads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import SUITE, Fleet, prompt, request, run_of_ports, running, spec, transfer

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
# Ranks of each instance; both others pull from the one that prefills.
RANKS = {"prefill": 2, "decode": 2, "any": 1}


@pytest.fixture(scope="module")
def fleet_process(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("tensor-parallel")
    wanted = spec(model, folder / "logs")
    wanted["pools"]["any"] = {"engine": {"kv_transfer_config": transfer("any")}}
    for role, size in RANKS.items():
        engine = wanted["pools"][role]["engine"]
        engine["tensor_parallel_size"] = size
        # With spinning workers on two cores some reads stall; see the limits in docs/disaggregation.md.
        engine["kv_transfer_config"]["kv_connector_extra_config"] = {"suite": {**SUITE, "pull_timeout_s": 3.0}}
    wanted["local"] |= {"first_port": run_of_ports(3), "first_side_channel_port": run_of_ports(3)}
    with running(folder, wanted) as process:
        yield process, folder / "logs"


@pytest.fixture
async def fleet(fleet_process: tuple[Any, Path]) -> AsyncIterator[Fleet]:
    process, log_dir = fleet_process
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(process, log_dir, session)
        yield fleet
        await fleet.idle(roles=tuple(RANKS))


@pytest.mark.parametrize("role", ["decode", "any"])
async def test_answers_are_one_engines(fleet: Fleet, role: str) -> None:
    async def pull(tokens: int, seed: int) -> None:
        # Not through the router: busy processes on two cores can be late for its polls.
        text = prompt(tokens, seed)
        alone = await fleet.post(request(text), role)
        first = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json
        pulled = await fleet.post(request(text, kv_transfer_params=first["kv_transfer_params"]), role)
        assert pulled.tokens == alone.tokens

    for index, tokens in enumerate((100, 5, 64, 300, 700, 100)):
        await pull(tokens, 80 + index)
    pulled = await fleet.metric(role, "vllm_suite_kv_pulls_total", outcome="ok")
    # A stalled read or an unanswered claim is recomputed: counted, never lost.
    recomputed = await fleet.metric(role, "vllm_suite_kv_recomputes_total")
    assert pulled >= 1
    assert pulled + recomputed == 6
