"""A fleet with encoders as the tests address it: its file, requests with pictures, and what its router counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from harness import CONTROL_KEY, MODEL, Answer, Fleet, run_of_ports, spec

from vllm_suite.fleet.pictures_parts import Part, image_part, text_part, user_message

CHAT = "/v1/chat/completions"
LOOPBACK = "127.0.0.1/32"
# A call to an encoder that hangs costs its request so much, once.
CALL_S = 5.0
_LIMITS = {"image": {"count": 4, "width": 336, "height": 336}, "video": 0}
# Patient: a busy machine is late for a question, and only what is dead, frozen or gone is to count as that.
_SUITE = {"claim_timeout_s": 3.0, "connect_timeout_s": 2.0}
_PATIENT = {"call_s": CALL_S, "probe_s": 2.0}
_STEPS = ("encode_retry", "encode_local", "encode_split", "media_sent", "decode_alone", "prefill_retry")
_OUTCOMES = ("encoded", "kept", "local", "failed")


def epd_spec(model: Path, log_dir: Path, encoders: int = 2, files: int = 80, **encode: Any) -> dict[str, Any]:
    """Encoders, prefill and decode; `files` is the port of the web server that pictures may come from."""
    wanted = spec(model, log_dir) | {"plugins": ["disagg", "epd"]}
    pools = wanted["pools"]
    for role in ("prefill", "decode"):
        pools[role]["engine"] |= {"limit_mm_per_prompt": _LIMITS, "ec_transfer_config": _consumer()}
    wanted["pools"] = {"encode": {"replicas": encoders, "engine": {"limit_mm_per_prompt": _LIMITS}}, **pools}
    fetch = {"enabled": True, "ports": [files], "allowed_networks": [LOOPBACK]}
    wanted["router"]["encode"] = {**_PATIENT, "fetch": fetch, **encode}
    wanted["router"]["membership"] = {"poll_timeout_s": 2.0, "forget_after_s": 4.0}
    instances = encoders + 2
    wanted["local"] |= {
        "first_port": run_of_ports(instances),
        "first_side_channel_port": run_of_ports(instances),
        "first_item_port": run_of_ports(encoders),
    }
    return wanted


def _consumer(**suite: Any) -> dict[str, Any]:
    extra = {"ec_connector_extra_config": {"suite": {**_SUITE, **suite}}}
    return {"ec_connector": "SuiteECConnector", "ec_connector_module_path": "vllm_epd.connector"} | {
        "ec_role": "ec_consumer",
        **extra,
    }


def blind(wanted: dict[str, Any]) -> dict[str, Any]:
    """The fleet without an encoder on prefill and decode."""
    for role in ("prefill", "decode"):
        engine = wanted["pools"][role]["engine"]
        del engine["limit_mm_per_prompt"]
        engine |= {"args": ["--epd-no-local-encoder"], "ec_transfer_config": _consumer(on_failure="fail")}
    return wanted


def look(*parts: Part, salt: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chat request about pictures; with another salt they are new to every cache."""
    content = [text_part("What is in it?"), *parts, text_part("And how many of them?")]
    return {
        "model": MODEL,
        "messages": user_message(content),
        "max_completion_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **({"cache_salt": salt} if salt else {}),
        **fields,
    }


def pictures(first_seed: int, count: int, size: int = 112) -> list[Part]:
    return [image_part(size, size, first_seed + i) for i in range(count)]


async def alone(fleet: Fleet, bodies: Sequence[dict[str, Any]]) -> list[list[int]]:
    """What one engine answers, which encodes, prefills and decodes by itself."""
    return [(await fleet.post(body, "decode", CHAT)).tokens for body in bodies]


async def through(fleet: Fleet, bodies: Sequence[dict[str, Any]], timeout_s: float = 30.0) -> list[Answer]:
    """The answers by way of the router, asked for at once; none may take longer than the deadlines add up to."""
    return await asyncio.gather(*(fleet.post(body, path=CHAT, timeout_s=timeout_s) for body in bodies))


async def counts(fleet: Fleet) -> dict[str, float]:
    """The router's recoveries by step and items by outcome; what prefill encoded and could not use."""
    found = {step: await fleet.metric("router", "vllm_suite_router_recoveries_total", step=step) for step in _STEPS}
    items = "vllm_suite_router_encode_items_total"
    found |= {outcome: await fleet.metric("router", items, outcome=outcome) for outcome in _OUTCOMES}
    found["stages"] = await fleet.metric("router", "vllm_suite_router_encode_request_seconds_count")
    for name in ("refused", "failed_items", "local_encodes"):
        found[f"prefill {name}"] = await fleet.metric("prefill", f"vllm_suite_ec_{name}_total")
    return found


async def since(fleet: Fleet, before: dict[str, float]) -> dict[str, float]:
    """What changed of `counts`."""
    now = await counts(fleet)
    return {name: value - before[name] for name, value in now.items() if value != before[name]}


async def instance(fleet: Fleet, name: str) -> dict[str, Any] | None:
    """The router's row of an instance; None where it knows none of that name."""
    rows = (await fleet.get("router", "/suite/v1/instances", CONTROL_KEY)).json["instances"]
    return next((row for row in rows if row["instance_id"].endswith("-" + name)), None)


async def working(fleet: Fleet, name: str) -> bool:
    """Whether the router waits for that encoder."""
    row = await instance(fleet, name)
    return row is not None and row["outstanding_encode_tokens"] > 0


async def until(condition: Callable[[], Awaitable[Any]], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < deadline, "not within the deadline"
        await asyncio.sleep(0.02)
