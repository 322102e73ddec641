"""A switch's view of the real engine: counts, limits by the utility channel, probes through the API server itself."""

from __future__ import annotations

import base64
import functools
import io
import os
import secrets
from collections.abc import Collection
from typing import Any

from vllm_suite.compat import role_queue
from vllm_suite.compat.engine_calls import call_engines
from vllm_suite.compat.role_limits import METHOD
from vllm_suite.compat.worker_calls import EngineGone
from vllm_suite.encoded import ERROR_KEY, ITEM_KEY, item_content
from vllm_suite.handoff import Handoff, fleet_key, parse
from vllm_suite.identity import Role, identity
from vllm_suite.roles.gate import PROBE_HEADER, REFUSED_HEADER, STAGE_HEADER, Door
from vllm_suite.roles.instance import EngineDied, Settings, SwitchError
from vllm_suite.roles.limits import RoleLimits
from vllm_suite.roles.state import Stage

PROBE_TOKENS = 4
_PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}


class RoleEngine:
    """`vllm_suite.roles.instance.Engine` over vLLM's client.

    Args:
        app: the API server's application; probes go through it, keys and gate included.
    """

    def __init__(self, client: Any, app: Any, args: Any, model: str, door: Door, limits: RoleLimits) -> None:
        self._client = client
        self._app = app
        self._model = model
        self._door = door
        self._limits = limits
        self._block = int(client.vllm_config.cache_config.block_size or 16)
        keys = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
        self._key = next((key for key in keys if key), None)

    async def unfinished(self) -> int:
        """See `Engine`."""
        [answer] = await self._ask(None)
        return int(answer["unfinished"]) + int(self._client.output_processor.get_num_unfinished_requests())

    async def untouched(self, names: Collection[str]) -> set[str]:
        """See `Engine`."""
        try:
            answers = await call_engines(self._client, role_queue.METHOD)
        except EngineGone:
            raise EngineDied from None
        waiting = {request for answer in answers.values() for request in answer}
        return role_queue.untouched(names, self._client.output_processor.request_states.items(), waiting)

    async def set_role(self, role: Role) -> Settings:
        """See `Engine`."""
        wanted = self._limits.of(role)
        [before] = await self._ask(None)
        [after] = await self._ask(wanted)
        if after["refused"] is not None:
            raise SwitchError(f"limits of {role}: {after['refused']}")
        [found] = await self._ask(None)
        for name, value in {**found["started"], **wanted}.items():
            if found["limits"][name] != value:
                raise SwitchError(f"{name} is {found['limits'][name]} and should be {value}")
        return Settings(before["limits"], found["limits"])

    async def probe(self, stage: Stage | None) -> object:
        """See `Engine`. Prompts are fixed, so that answers can be compared."""
        if stage == "prefill":
            return await self._prefill()
        if stage == "encode":
            return await self._encode()
        body = {"prompt": list(range(3, 11)), "max_tokens": PROBE_TOKENS, "ignore_eos": True, "return_token_ids": True}
        status, answer, _ = await self._post(stage, body)
        tokens = _choice(answer).get("token_ids")
        if status != 200 or not isinstance(tokens, list) or len(tokens) != PROBE_TOKENS:
            raise SwitchError(f"the decode probe got status {status} and tokens {tokens!r}")
        return tokens

    async def _encode(self) -> object:
        # A name that no cache knows: the picture is really encoded.
        name = secrets.token_hex(16)
        picture = {"type": "image_url", "image_url": {"url": _picture()}, "uuid": name}
        body = {
            "messages": [{"role": "user", "content": [picture]}],
            "max_tokens": 1,
            "ec_transfer_params": {"suite_encode_only": True},
        }
        status, answer, _ = await self._post("encode", body, "/v1/chat/completions")
        entries = answer.get("ec_transfer_params")
        entries = list(entries.items()) if isinstance(entries, dict) else []
        if status != 200 or len(entries) != 1 or not isinstance(entries[0][1], dict):
            raise SwitchError(f"the encode probe got status {status} and {len(entries)} items: {answer}"[:500])
        identifier, entry = entries[0]
        wrong = _unlike(entry, identifier)
        if wrong is not None:
            raise SwitchError(f"the encode probe's item: {wrong}")
        return True

    async def refuses(self, stage: Stage) -> bool:
        """See `Engine`."""
        status, _, refused = await self._post(stage, {"prompt": [3], "max_tokens": 1})
        return status == 503 and refused

    async def _prefill(self) -> object:
        prompt = [3 + i % 8 for i in range(2 * self._block + 1)]
        body = {"prompt": prompt, "max_tokens": 1, "kv_transfer_params": dict(_PREFILL)}
        status, answer, _ = await self._post("prefill", body)
        reference = answer.get("kv_transfer_params")
        reference = reference if isinstance(reference, dict) else {}
        if status != 200 or reference.get("do_remote_prefill") is not True or not reference.get("remote_block_ids"):
            raise SwitchError(f"the prefill probe got status {status} and no reference to KV blocks")
        return True

    async def _post(
        self, stage: Stage | None, body: dict[str, Any], path: str = "/v1/completions"
    ) -> tuple[int, dict[str, Any], bool]:
        import httpx

        headers = {PROBE_HEADER: self._door.probe_key}
        if stage is not None:
            headers[STAGE_HEADER] = stage
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        transport = httpx.ASGITransport(app=self._app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://probe", timeout=None) as client:
            document = {"model": self._model, "temperature": 0, "stream": False, **body}
            response = await client.post(path, json=document, headers=headers)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        return response.status_code, answer if isinstance(answer, dict) else {}, REFUSED_HEADER in response.headers

    async def _ask(self, wanted: dict[str, int] | None) -> list[dict[str, Any]]:
        try:
            answers = list((await call_engines(self._client, METHOD, wanted)).values())
        except EngineGone:
            raise EngineDied from None
        if len(answers) != 1:
            raise SwitchError(f"{len(answers)} engines answered; one is supported")
        return answers


def _unlike(entry: dict[str, Any], identifier: str) -> str | None:
    """What is wrong with an item's reference, of which this instance has to be the producer; None: nothing."""
    if ERROR_KEY in entry:
        return f"it was encoded and not kept: {entry[ERROR_KEY]!r}"
    ref = parse(entry.get(ITEM_KEY))
    if not isinstance(ref, Handoff):
        return f"its reference is {ref.value}"
    me, key = identity(), fleet_key()
    if (ref.producer, ref.epoch) != (me.instance_id, me.epoch):
        return f"it is of {ref.producer} epoch {ref.epoch}"
    if ref.check_signature(key) is not None:
        return "its signature is wrong"
    if ref.content != item_content(identifier) or ref.tokens < 1:
        return f"it is of other content, with {ref.tokens} rows"
    return None


@functools.cache
def _picture() -> str:
    """A plain picture as a `data:` URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (112, 112), (90, 120, 30)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}
