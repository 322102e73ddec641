"""Instances of role `any` that become an encoder, a prefill and a decode, and change again, under pictures."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from epd_fleet import CHAT, look, pictures
from harness import Fleet, run_of_ports, running, spec
from test_roles import known, switch

from vllm_suite.fleet.tiny_media import write

LIMITS = {"image": {"count": 4, "width": 336, "height": 336}, "video": 0}


@pytest.fixture(scope="module")
def fleet_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tmp_path_factory.mktemp("roles-encode")
    model = write("qwen2_5_vl", tmp_path_factory.mktemp("media") / "qwen2_5_vl")
    wanted = spec(model, folder / "logs") | {"plugins": ["disagg", "epd"]}
    wanted["pools"] = {"any": {"replicas": 3, "engine": {"limit_mm_per_prompt": LIMITS}}}
    wanted["env"]["VLLM_SUITE_ROLE_LIMITS"] = json.dumps({"encode": {"max_num_seqs": 2}})
    wanted["local"] |= {name: run_of_ports(3) for name in ("first_port", "first_side_channel_port", "first_item_port")}
    with running(folder, wanted) as process:
        yield process, folder / "logs"


@pytest.fixture
async def fleet(fleet_process: tuple[Any, Path]) -> AsyncIterator[Fleet]:
    process, log_dir = fleet_process
    async with aiohttp.ClientSession() as session:
        yield Fleet(process, log_dir, session)


async def encoded(fleet: Fleet) -> list[float]:
    return [await fleet.metric(f"any-{i}", "vllm_suite_ec_encoded_items_total") for i in range(3)]


@pytest.mark.slow
async def test_to_encode_and_back(fleet: Fleet) -> None:
    bodies = [look(*pictures(100 + 10 * i, 2), salt=f"a{i}") for i in range(2)]
    want = [(await fleet.post(body, path=CHAT)).tokens for body in bodies]
    reports = [await switch(fleet, "any-0", "encode")]
    for name, target in (("any-1", "prefill"), ("any-2", "decode")):
        reports.append(await switch(fleet, name, target))
    for name, target in (("any-0", "encode"), ("any-1", "prefill"), ("any-2", "decode")):
        await known(fleet, name, target)
    assert reports[0]["verified"] == ["served encode", "refused prefill", "refused decode"]
    assert reports[0]["changed"] == {"max_num_seqs": [8, 2]}
    before, fetched = await encoded(fleet), await fleet.metric("any-1", "vllm_suite_ec_fetches_total", outcome="ok")
    assert before[0] >= 1, "the probe was not encoded"
    for i, body in enumerate(bodies):
        assert (await fleet.post({**body, "cache_salt": f"b{i}"}, path=CHAT)).tokens == want[i]
    assert [now - then for now, then in zip(await encoded(fleet), before, strict=True)] == [4, 0, 0]
    assert await fleet.metric("any-1", "vllm_suite_ec_fetches_total", outcome="ok") - fetched == 4
    # An encoder becomes a decode, and the decode an encoder.
    reports = [await switch(fleet, "any-0", "decode"), await switch(fleet, "any-2", "encode")]
    assert reports[0]["verified"] == ["served decode", "refused encode"]
    for name, target in (("any-0", "decode"), ("any-2", "encode")):
        await known(fleet, name, target)
    before = await encoded(fleet)
    for i, body in enumerate(bodies):
        assert (await fleet.post({**body, "cache_salt": f"c{i}"}, path=CHAT)).tokens == want[i]
    assert [now - then for now, then in zip(await encoded(fleet), before, strict=True)] == [0, 0, 4]
    print("switches", json.dumps(reports))
