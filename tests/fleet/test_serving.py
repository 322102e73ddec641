"""The healthy fleet: right answers, the API's own errors, nothing smuggled in, nothing kept for a client that left."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import aiohttp
import pytest
from harness import CONTROL_KEY, ENGINE_KEY, KEY, MODEL, Fleet, prompt, request

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


async def test_answers_equal_one_engines_and_come_over_nixl(fleet: Fleet) -> None:
    before = await fleet.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok")
    for tokens in (1, 33, 700):
        text = prompt(tokens, tokens)
        alone = await fleet.post(request(text), "decode")
        assert (await fleet.post(request(text))).tokens == alone.tokens
    assert await fleet.metric("decode", "vllm_suite_kv_pulls_total", outcome="ok") == before + 3


async def test_streaming_and_chat(fleet: Fleet) -> None:
    text = prompt(300, 50)
    alone = await fleet.post(request(text, 12), "decode")
    streamed = await fleet.post(request(text, 12, stream=True))
    events = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    tokens = [t for event in events[:-1] for choice in json.loads(event)["choices"] for t in choice["token_ids"]]
    assert tokens == alone.tokens
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello there " * 20}], "temperature": 0}
    chat |= {"max_completion_tokens": 9, "ignore_eos": True}
    direct = await fleet.post(chat, "decode", "/v1/chat/completions")
    routed = await fleet.post(chat, path="/v1/chat/completions")
    assert routed.status == 200
    assert routed.json["choices"][0]["message"] == direct.json["choices"][0]["message"]
    assert routed.json["usage"] == direct.json["usage"]


# The same request to the engine and through the router; status and error must be the same.
BAD: dict[str, Any] = {
    "not json": b"{",
    "not an object": b"[]",
    "empty": b"",
    "unknown model": {"model": "other", "prompt": "hi"},
    "no prompt": {"model": "tiny"},
    "wrong type": {"model": "tiny", "prompt": "hi", "max_tokens": "many"},
    "negative": {"model": "tiny", "prompt": "hi", "max_tokens": -1},
    "temperature": {"model": "tiny", "prompt": "hi", "temperature": -3},
    "too long": {"model": "tiny", "prompt": prompt(5000, 1), "max_tokens": 4},
    "token out of range": {"model": "tiny", "prompt": [1, 2, 10**7]},
    "stream_options alone": {"model": "tiny", "prompt": "hi", "stream_options": {"include_usage": True}},
    "prompt of objects": {"model": "tiny", "prompt": [{"a": 1}]},
    "n of zero": {"model": "tiny", "prompt": "hi", "n": 0},
}


@pytest.mark.parametrize("name", BAD)
async def test_errors_are_vllms_own(fleet: Fleet, name: str) -> None:
    direct, routed = await fleet.post(BAD[name], "decode"), await fleet.post(BAD[name])
    assert routed.status == direct.status
    assert routed.status >= 400
    mine, theirs = routed.json["error"], direct.json["error"]
    assert set(mine) == set(theirs)
    assert (mine["type"], mine["code"]) == (theirs["type"], theirs["code"])


async def test_chat_errors_are_vllms_own(fleet: Fleet) -> None:
    for body in ({"model": "tiny"}, {"model": "tiny", "messages": "hi"}, {"model": "other", "messages": []}):
        direct = await fleet.post(body, "decode", "/v1/chat/completions")
        routed = await fleet.post(body, path="/v1/chat/completions")
        assert (routed.status, set(routed.json["error"])) == (direct.status, set(direct.json["error"]))


async def test_keys(fleet: Fleet) -> None:
    assert (await fleet.get("router", "/health")).status == 200
    for path in ("/v1/models", "/ready", "/metrics", "/suite/v1/instances"):
        assert (await fleet.get("router", path)).status == 401, path
        assert (await fleet.get("router", path, "wrong")).status == 401, path
    assert (await fleet.get("router", "/v1/models", KEY)).status == 200
    assert (await fleet.get("router", "/suite/v1/instances", KEY)).status == 401
    assert (await fleet.get("decode", "/suite/v1/state")).status == 401
    assert (await fleet.get("decode", "/suite/v1/state", ENGINE_KEY)).status == 401
    state = (await fleet.get("decode", "/suite/v1/state", CONTROL_KEY)).json
    assert state["role"] == "decode"
    assert state["kv_connector"] == "SuiteNixlConnector"


async def test_a_client_cannot_bring_its_own_reference(fleet: Fleet) -> None:
    text = prompt(200, 51)
    alone = await fleet.post(request(text), "decode")
    other = (await fleet.post(request(prompt(200, 52), 1, kv_transfer_params=PREFILL), "prefill")).json
    before = await fleet.metric("decode", "vllm_suite_kv_refused_total")
    for smuggled in (other["kv_transfer_params"], PREFILL, {"remote_host": "192.0.2.1", "do_remote_prefill": True}):
        answer = await fleet.post(request(text, kv_transfer_params=smuggled))
        assert answer.tokens == alone.tokens
        assert not answer.json.get("kv_transfer_params")
    assert await fleet.metric("decode", "vllm_suite_kv_refused_total") == before
    assert await fleet.metric("router", "vllm_suite_router_stripped_total") >= 3


async def test_corrupt_and_replayed_references_over_http(fleet: Fleet) -> None:
    text = prompt(200, 53)
    alone = await fleet.post(request(text), "decode")
    kv = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json["kv_transfer_params"]
    corrupt = {**kv, "remote_block_ids": [[b + 1 for b in kv["remote_block_ids"][0]]]}
    for params in (corrupt, kv, kv):
        assert (await fleet.post(request(text, kv_transfer_params=params), "decode")).tokens == alone.tokens
    # The fleet key signs the fence; block ids are covered by its location digest.
    assert await fleet.metric("decode", "vllm_suite_kv_refused_total", reason="tampered") == 1
    assert await fleet.metric("decode", "vllm_suite_kv_refused_total", reason="reused") == 1


async def test_an_instance_generates_for_nobody_without_its_key(fleet: Fleet) -> None:
    body = {"model": MODEL, "prompt": "a", "max_tokens": 2}
    for path in ("/invocations", "/v1/completions", "/tokenize"):
        async with fleet.session.post(fleet.url("decode") + path, json=body) as answer:
            assert (answer.status, await answer.text()) == (401, '{"error":"Unauthorized"}'), path
        assert (await fleet.post(body, "decode", path)).status == 200, path


async def test_references_that_are_none_over_http(fleet: Fleet) -> None:
    """Any of them would end the engine if an exception left the scheduler."""
    text = prompt(200, 58)
    alone = await fleet.post(request(text), "decode")
    kv = (await fleet.post(request(text, 1, kv_transfer_params=PREFILL), "prefill")).json["kv_transfer_params"]

    async def refused(reason: str) -> float:
        return await fleet.metric("decode", "vllm_suite_kv_refused_total", reason=reason)

    no_mac = {key: value for key, value in kv["suite"].items() if key != "mac"}
    wrong: dict[str, list[Any]] = {
        "bad_signature": [{**kv["suite"], "mac": "\u00e9" * 64}, {**kv["suite"], "producer": "\u00e9"}, no_mac],
        "malformed": [{**kv["suite"], "mac": 5}, {**kv["suite"], "mac": ["a"]}, {}],
        "unfenced": [None],
    }
    for reason, parts in wrong.items():
        before = await refused(reason)
        for part in parts:
            answer = await fleet.post(request(text, kv_transfer_params={**kv, "suite": part}), "decode")
            assert answer.tokens == alone.tokens, part
        assert await refused(reason) == before + len(parts)
    # What vLLM cannot hand to its engine, it refuses itself.
    part = {**kv["suite"], "mac": "\ud800"}
    assert (await fleet.post(request(text, kv_transfer_params={**kv, "suite": part}), "decode")).status == 500
    assert (await fleet.post(request(text, kv_transfer_params=kv), "decode")).tokens == alone.tokens


async def test_a_client_that_leaves_during_prefill(fleet: Fleet) -> None:
    with pytest.raises(TimeoutError):
        await fleet.post(request(prompt(1900, 54), 100), timeout_s=0.03)
    await fleet.idle()


async def test_a_client_that_leaves_during_decode(fleet: Fleet) -> None:
    body = json.dumps(request(prompt(300, 55), 1500, stream=True)).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    async with fleet.session.post(fleet.url("router") + "/v1/completions", data=body, headers=headers) as answer:
        async for _ in answer.content:
            break
        assert await fleet.metric("decode", "vllm:num_requests_running") == 1
        answer.close()
    for _ in range(50):
        if await fleet.metric("decode", "vllm:num_requests_running") == 0:
            break
        await asyncio.sleep(0.1)
    await fleet.idle(10)


async def test_many_at_once(fleet: Fleet) -> None:
    texts = [prompt(20 + 13 * i, 600 + i) for i in range(24)]
    alone = [await fleet.post(request(text), "decode") for text in texts]
    answers = await asyncio.gather(*(fleet.post(request(text)) for text in texts))
    assert [a.tokens for a in answers] == [a.tokens for a in alone]


async def test_a_request_id_reaches_both_stages(fleet: Fleet) -> None:
    answer = await fleet.post(request(prompt(40, 56)), **{"X-Request-Id": "my-request-1"})
    assert answer.headers["x-request-id"] == "my-request-1"
    assert "my-request-1" in answer.json["id"]


async def test_large_bodies_are_refused_before_they_are_read(fleet: Fleet) -> None:
    try:
        answer = await fleet.post(b"x" * (33 << 20))
    except aiohttp.ClientError:
        return  # closed while sending
    assert answer.status == 413
    assert answer.json["error"]["code"] == 413


async def pod(*words: str) -> tuple[int, str]:
    """What Kubernetes runs in a pod of the chart, here beside a fleet of `up`: exit status and what it said."""
    keys = {"VLLM_SUITE_API_KEY": KEY, "VLLM_SUITE_CONTROL_KEY": CONTROL_KEY, "VLLM_API_KEY": ENGINE_KEY}
    made = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_suite.fleet.pod", "--timeout=30", *words,
        env={**os.environ, **keys}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    async with asyncio.timeout(90):
        said, _ = await made.communicate()
    assert made.returncode is not None
    return made.returncode, said.decode()


async def state(fleet: Fleet, role: str) -> dict[str, Any]:
    return (await fleet.get(role, "/suite/v1/state", CONTROL_KEY)).json


async def test_probes_and_the_charts_test_on_real_engines(fleet: Fleet) -> None:
    prefill, decode, router = (fleet.url(name) for name in ("prefill", "decode", "router"))
    for role, url in (("prefill", prefill), ("decode", decode)):
        asked = ("ready", f"--url={url}", "--connector=SuiteNixlConnector")
        assert await pod(*asked, f"--role={role}") == (0, "ready\n")
        status, said = await pod(*asked, "--role=encode")
        assert (status, f"its role is '{role}'" in said) == (1, True)
    # Routers pair instances by this.
    kv = [(await state(fleet, role))["kv"] for role in ("prefill", "decode")]
    assert kv[0] == kv[1]
    assert (await pod("router-ready", f"--url={router}"))[0] == 0
    status, said = await pod("check", f"--router={router}", f"--decode={decode}", "--prompt-tokens=100")
    assert status == 0, said
    assert said.startswith("disaggregated: ")
    assert "1 pulls, 0 recoveries" in said


async def test_drain_waits_for_what_runs(fleet: Fleet) -> None:
    running = asyncio.create_task(fleet.post(request(prompt(40, 7), 400), "decode"))
    while (await state(fleet, "decode"))["load"]["running"] == 0:
        assert not running.done()
        await asyncio.sleep(0.02)
    status, said = await pod("drain", f"--url={fleet.url('decode')}", "--settle=0.1", "--finish=80")
    assert (status, said) == (0, "drained\n")
    assert running.done()
    assert len(running.result().tokens) == 400
