"""``/suite/v1/role`` as the control plugin serves it, over an engine that keeps limits and answers probes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from vllm_suite.compat import role_limits, role_routes
from vllm_suite.compat.endpoint import Control
from vllm_suite.compat.role_engine import RoleEngine
from vllm_suite.encoded import item_content
from vllm_suite.handoff import Handoff
from vllm_suite.identity import identity
from vllm_suite.roles.gate import STAGE_HEADER
from vllm_suite.roles.limits import parse

KEY = {"Authorization": "Bearer k"}
STARTED = {"max_num_batched_tokens": 2048, "max_num_seqs": 64, "long_prefill_token_threshold": 0}


def scheduler(**config: Any) -> Any:
    settings = {"long_prefill_token_threshold": 0, "enable_chunked_prefill": True, "disable_chunked_mm_input": False}
    return SimpleNamespace(
        max_num_scheduled_tokens=2048,
        max_num_active_reqs=64,
        num_spec_tokens=0,
        scheduler_config=SimpleNamespace(**{**settings, **config}),
        get_num_unfinished_requests=lambda: 0,
    )


class Core:
    """vLLM's client as far as a switch uses it."""

    def __init__(self) -> None:
        self.scheduler = scheduler()
        self.deaf = False
        self.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(block_size=16),
            parallel_config=SimpleNamespace(data_parallel_size=1, _api_process_count=1),
            ec_transfer_config=None,
            model_config=SimpleNamespace(is_multimodal_model=True),
        )
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)

    async def ask(self, client: Any, method: str, wanted: Any) -> dict[int, Any]:
        assert method == role_limits.METHOD
        return {0: role_limits.answer(self, None if self.deaf else wanted)}


class Served:
    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, keys: list[str] | None, limits: str, encodes: bool = False
    ) -> None:
        self.core = Core()
        self.references = True
        self.control = Control()
        self.app = FastAPI()
        self.app.state.args = SimpleNamespace(api_key=keys)
        self.control.attach_router(self.app)
        monkeypatch.setenv("VLLM_SUITE_ROLE_LIMITS", limits)
        monkeypatch.setattr("vllm_suite.compat.role_engine.call_engines", self.core.ask)
        self.app.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        self.item: dict[str, Any] = {}
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        self.core.vllm_config.ec_transfer_config = SimpleNamespace(ec_role="ec_both") if encodes else None
        self.control._roles.start(self.core, self.app.state.args, "tiny")
        transport = httpx.ASGITransport(app=self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://x")

    async def completions(self, request: Request) -> JSONResponse:
        body = await request.json()
        answer: dict[str, Any] = {"choices": [{"token_ids": [7] * body["max_tokens"]}]}
        if (body.get("kv_transfer_params") or {}).get("do_remote_decode") and self.references:
            answer["kv_transfer_params"] = {"do_remote_prefill": True, "remote_block_ids": [[1, 2, 3]]}
        return JSONResponse(answer)

    async def chat(self, request: Request) -> JSONResponse:
        """An encoder; `item` is what is wrong with its reference."""
        body = await request.json()
        assert body["ec_transfer_params"] == {"suite_encode_only": True}
        [part] = body["messages"][0]["content"]
        assert part["image_url"]["url"].startswith("data:image/png;base64,")
        name, me = part["uuid"], identity()
        fields = {"version": 1, "request_id": "r", "model": "m", "layout": "l", "location": "w", "lease_s": 1.0}
        fields |= {"claim_host": "127.0.0.1", "claim_port": 9, "tokens": 16, "content": item_content(name)}
        ref = Handoff(**{**fields, "producer": me.instance_id, "epoch": me.epoch, **self.item})
        return JSONResponse({"choices": [], "ec_transfer_params": {name: {"suite": ref.signed(b"fleet").to_json()}}})

    async def get(self) -> dict[str, Any]:
        return (await self.client.get("/suite/v1/role", headers=KEY)).json()  # type: ignore[no-any-return]

    async def set(self, role: str, epoch: str | None = None, role_epoch: int = 0) -> httpx.Response:
        body = {"role": role, "epoch": epoch or identity().epoch, "role_epoch": role_epoch}
        return await self.client.post("/suite/v1/role", headers=KEY, json=body)

    async def settled(self) -> dict[str, Any]:
        async with asyncio.timeout(5):
            while (now := await self.get())["target"] is not None or now["last"]["outcome"] is None:
                await asyncio.sleep(0.01)
        return now


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    monkeypatch.delenv("VLLM_SUITE_CONTROL_KEY", raising=False)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.delenv("VLLM_SUITE_ROLE", raising=False)
    monkeypatch.setenv("VLLM_SUITE_PLUGINS", "disagg")
    made: list[Served] = []

    def start(keys: list[str] | None = ["k"], limits: str = "{}", encodes: bool = False) -> Served:  # noqa: B006
        made.append(Served(monkeypatch, keys, limits, encodes))
        return made[-1]

    yield start
    for served in made:
        await served.client.aclose()


async def test_a_switch_from_end_to_end(make: Any) -> None:
    served = make(limits='{"decode": {"max_num_batched_tokens": 256}, "prefill": {"max_num_seqs": 8}}')
    now = await served.get()
    assert (now["role"], now["role_epoch"], now["phase"], now["fixed"]) == ("any", 0, "serving", None)
    begun = await served.set("decode")
    assert (begun.status_code, begun.json()["outcome"]) == (202, "begun")
    now = await served.settled()
    assert (now["role"], now["role_epoch"], now["phase"]) == ("decode", 1, "serving")
    assert now["last"]["changed"] == {"max_num_batched_tokens": [2048, 256]}
    assert now["last"]["verified"] == ["served decode", "refused encode", "refused prefill"]
    assert now["last"]["accepts"] == {"encode": [True, False], "prefill": [True, False]}
    assert role_limits.read(served.core.scheduler) == {**STARTED, "max_num_batched_tokens": 256}
    for stage, status in (("decode", 200), ("prefill", 503)):
        body = {"prompt": [3], "max_tokens": 1}
        answer = await served.client.post("/v1/completions", json=body, headers={STAGE_HEADER: stage, **KEY})
        assert answer.status_code == status
    assert (await served.set("prefill", role_epoch=1)).status_code == 202
    now = await served.settled()
    assert role_limits.read(served.core.scheduler) == {**STARTED, "max_num_seqs": 8}
    assert now["last"]["outcome"] == "switched"
    assert (await served.set("decode", role_epoch=2)).status_code == 202
    await served.settled()


async def test_to_encode_and_back(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SUITE_FLEET_KEY", "fleet")
    served = make(limits='{"encode": {"max_num_seqs": 4}}', encodes=True)
    assert (await served.get())["can"] == ["encode", "prefill", "decode", "any"]
    await served.set("encode")
    now = await served.settled()
    assert (now["role"], now["last"]["outcome"]) == ("encode", "switched")
    assert now["last"]["changed"] == {"max_num_seqs": [64, 4]}
    assert now["last"]["verified"] == ["served encode", "refused prefill", "refused decode"]
    await served.set("any", role_epoch=1)
    now = await served.settled()
    assert now["last"]["verified"] == ["served encode", "served prefill", "served decode"]
    assert now["last"]["accepts"] == {"prefill": [False, True], "decode": [False, True]}


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ({"producer": "somebody"}, "it is of somebody"),
        ({"epoch": "0"}, "epoch 0"),
        ({"content": "c"}, "it is of other content"),
        ({"tokens": 0}, "with 0 rows"),
        ({"claim_port": 0}, "its reference is malformed"),
    ],
)
async def test_an_encode_probe_is_looked_at(
    make: Any, monkeypatch: pytest.MonkeyPatch, item: dict[str, Any], text: str
) -> None:
    monkeypatch.setenv("VLLM_SUITE_FLEET_KEY", "fleet")
    served = make(encodes=True)
    served.item = item
    await served.set("encode")
    now = await served.settled()
    assert (now["role"], now["phase"], now["last"]["outcome"]) == ("any", "serving", "back")
    assert text in now["last"]["reason"]


async def test_an_encode_probe_has_to_be_signed(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SUITE_FLEET_KEY", "another")
    served = make(encodes=True)
    await served.set("encode")
    assert "its signature is wrong" in (await served.settled())["last"]["reason"]


async def test_what_is_refused(make: Any) -> None:
    served = make()
    for status, outcome, reason, answer in (
        (200, "noop", "noop", await served.set("any")),
        (409, "refused", "stale", await served.set("decode", role_epoch=1)),
        (409, "refused", "stale", await served.set("decode", epoch="0" * 16)),
        (409, "refused", "impossible", await served.set("encode")),
        (400, "refused", "malformed", await served.set("king")),
    ):
        assert (answer.status_code, answer.json()["outcome"], answer.json()["reason"]) == (status, outcome, reason)
    for body in (b"", b"[]", b"{", b'{"role": "decode"}', b"x" * 9999):
        assert (await served.client.post("/suite/v1/role", headers=KEY, content=body)).status_code == 400
    assert (await served.get())["last"] is None
    assert (await served.set("decode")).status_code == 202
    assert (await served.set("prefill")).json()["reason"] == "busy"


async def test_keys(make: Any) -> None:
    served = make()
    for headers in ({}, {"Authorization": "Bearer x"}, {"Authorization": "k"}):
        assert (await served.client.get("/suite/v1/role", headers=headers)).status_code == 401
        assert (await served.client.post("/suite/v1/role", headers=headers, json={})).status_code == 401
    # Reading is open where there is no key; switching is not.
    served = make(keys=None)
    assert (await served.client.get("/suite/v1/role")).status_code == 200
    assert (await served.set("decode")).json()["reason"] == "no_key"
    assert (await served.get())["role"] == "any"


async def test_limits_that_do_not_take_are_no_success(make: Any) -> None:
    served = make(limits='{"decode": {"max_num_seqs": 8}}')
    served.core.deaf = True
    await served.set("decode")
    now = await served.settled()
    assert (now["last"]["outcome"], now["role"], now["role_epoch"]) == ("back", "any", 0)
    assert now["failure"] == "switching: max_num_seqs is 64 and should be 8"


async def test_a_prefill_without_a_reference_is_no_success(make: Any) -> None:
    served = make()
    served.references = False
    await served.set("prefill")
    now = await served.settled()
    assert now["last"]["outcome"] == "back"
    assert "no reference to KV blocks" in now["failure"]


@pytest.mark.parametrize(
    ("role", "plugins", "config", "why"),
    [
        ("decode", "disagg", {}, "it was started as decode"),
        ("any", "epd", {}, "without plugin disagg"),
        ("any", "disagg", {"data_parallel_size": 2}, "several data-parallel engines"),
        ("any", "disagg", {"_api_process_count": 2}, "several API servers"),
    ],
)
async def test_who_cannot_switch(
    monkeypatch: pytest.MonkeyPatch, make: Any, role: str, plugins: str, config: dict[str, int], why: str
) -> None:
    served = make()
    monkeypatch.setenv("VLLM_SUITE_ROLE", role)
    monkeypatch.setenv("VLLM_SUITE_PLUGINS", plugins)
    vars(served.core.vllm_config.parallel_config).update(config)
    found = role_routes.why_fixed(served.core)
    assert found is not None
    assert why in found


@pytest.mark.parametrize(
    ("wanted", "config", "why"),
    [
        ({"max_num_batched_tokens": 4096}, {}, "more than the 2048"),
        ({"kv_cache": 1}, {}, "kv_cache cannot change while the engine runs"),
        ({"max_num_seqs": 0}, {}, "at least 1"),
        ({"max_num_seqs": True}, {}, "whole number"),
        ({"max_num_batched_tokens": 512}, {"enable_chunked_prefill": False}, "chunked prefill only"),
        ({"max_num_batched_tokens": 512}, {"disable_chunked_mm_input": True}, "--disable-chunked-mm-input"),
        ({"max_num_batched_tokens": 63}, {}, "less than 1 for each of 64"),
    ],
)
def test_limits_that_cannot_be_set(wanted: dict[str, int], config: dict[str, bool], why: str) -> None:
    core = SimpleNamespace(scheduler=scheduler(**config))
    answer = role_limits.answer(core, wanted)
    assert why in str(answer["refused"])
    assert answer["limits"] == STARTED
    assert role_limits.answer(core, {"long_prefill_token_threshold": 9})["limits"]["long_prefill_token_threshold"] == 9
    assert role_limits.answer(core, {})["limits"] == STARTED


@pytest.mark.parametrize("text", ['{"x": {}}', '{"decode": {"max_num_seqs": 0}}', '{"decode": {"a": 1}}', "["])
def test_limits_of_the_environment(text: str) -> None:
    with pytest.raises(ValueError, match="VLLM_SUITE_ROLE_LIMITS"):
        parse(text)


def test_the_probe_has_a_key_of_the_server(make: Any) -> None:
    served = make()
    door = served.control._roles.door
    engine = RoleEngine(served.core, served.app, SimpleNamespace(api_key=["a", "b"]), "t", door, parse(""))
    assert engine._key == "a"
