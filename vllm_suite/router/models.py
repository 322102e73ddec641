"""GET /v1/models over a pool."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
from aiohttp import web

from vllm_suite.router.config import RouterConfig
from vllm_suite.router.errors import UpstreamFailure, error_response
from vllm_suite.router.members import Member, Pool
from vllm_suite.router.upstream import read_all

_TIMEOUT_S = 5.0
_MAX_BYTES = 1 << 20


async def list_models(
    pool: Pool, session: aiohttp.ClientSession, authorization: str | None, config: RouterConfig
) -> web.Response:
    """One instance's own answer where all serve the same models, otherwise the union of their lists."""
    groups: dict[tuple[str, ...], Member] = {}
    for member in pool.eligible(("decode", "any"), None):
        groups.setdefault(member.state.models, member)
    if not groups:
        retry_after_s = config.limits.retry_after_s
        return error_response(503, "no decode instance is ready", retry_after_s=retry_after_s)
    headers = {"Authorization": authorization} if authorization else {}
    answers: list[tuple[int, bytes]] = []
    for member in groups.values():
        try:
            async with (
                asyncio.timeout(_TIMEOUT_S),
                session.get(member.models, headers=headers, allow_redirects=False) as response,
            ):
                answers.append((response.status, await read_all(response, _MAX_BYTES)))
        except (aiohttp.ClientError, aiohttp.http_exceptions.HttpProcessingError, OSError, UpstreamFailure):
            # TimeoutError is an OSError, a list that is too long an UpstreamFailure.
            return error_response(502, "an instance did not list its models")
    if len(answers) == 1:
        status, body = answers[0]
        return web.Response(status=status, body=body, content_type="application/json")
    cards: dict[str, object] = {}
    for status, body in answers:
        try:
            data = msgspec.json.decode(body)["data"] if status == 200 else []
            for card in data:
                cards.setdefault(card["id"], card)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
            return error_response(502, "an instance did not list its models")
    merged = msgspec.json.encode({"object": "list", "data": list(cards.values())})
    return web.Response(body=merged, content_type="application/json")
