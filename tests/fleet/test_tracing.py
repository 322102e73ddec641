"""Router, encoder, prefill and decode of a real fleet send their spans of one request under one trace id."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import pytest
from epd_fleet import CHAT, epd_spec, look, pictures
from harness import Fleet, running
from otlp_collector import collecting

from vllm_suite.fleet.tiny_media import write

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = CLIENT.split("-")[1]


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_one_trace_over_the_router_and_three_engines(tmp_path: Path) -> None:
    model = write("qwen2_5_vl", tmp_path / "model")
    async with collecting() as collector:
        wanted = epd_spec(model, tmp_path / "logs", encoders=1, overlap="never")
        wanted["tracing"] = {"endpoint": collector.url}
        fleet_of = running(tmp_path, wanted)
        process = await asyncio.to_thread(fleet_of.__enter__)
        try:
            async with aiohttp.ClientSession() as session:
                fleet = Fleet(process, tmp_path / "logs", session)
                for role in ("encode", "prefill", "decode"):
                    await fleet.ready(role)
                headers = {"traceparent": CLIENT, "Authorization": "Bearer client-key", "X-Request-Id": "traced"}
                body = look(*pictures(1, 2))
                async with session.post(fleet.url("router") + CHAT, json=body, headers=headers) as response:
                    assert response.status == 200, await response.text()
                async with asyncio.timeout(60):
                    while True:
                        seen = collector.of(TRACE)
                        if len({span.service for span in seen}) == 4 and any(span.name == "transfer" for span in seen):
                            break
                        await asyncio.sleep(0.2)
        finally:
            await asyncio.to_thread(fleet_of.__exit__, None, None, None)
    spans = collector.of(TRACE)
    assert {span.service for span in spans} == {"fleet-router", "fleet-encode", "fleet-prefill", "fleet-decode"}
    ours = {span.name: span for span in spans if span.service == "fleet-router"}
    assert {"vllm_suite.request chat", "media", "encode", "prefill", "decode"} <= set(ours)
    # Each engine's span is below the router's span of that stage.
    for stage in ("encode", "prefill", "decode"):
        (engine,) = [span for span in spans if span.service == f"fleet-{stage}" and span.name == "llm_request"]
        assert engine.parent == ours[stage].span
        assert engine.attributes["gen_ai.request.id"].find("traced") >= 0
    # Decode's pull is beside its engine's span, and names whom it pulled from.
    (pull,) = [span for span in spans if span.name == "transfer"]
    assert (pull.service, pull.parent, pull.failed) == ("fleet-decode", ours["decode"].span, False)
    assert pull.attributes["vllm_suite.instance"] == ours["prefill"].attributes["vllm_suite.instance"]
    assert pull.attributes["vllm_suite.bytes"] > 0
