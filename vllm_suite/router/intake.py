"""A request from outside: its body within the limits, and what may not pass taken out."""

from __future__ import annotations

import asyncio

from aiohttp import web

from vllm_suite.router.auth import Keys
from vllm_suite.router.bodies import strip_transfer_fields
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.errors import error_response
from vllm_suite.router.guard import Guard
from vllm_suite.router.headers import REQUEST_ID, request_id, upstream_headers
from vllm_suite.router.job import Job
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.prompt import Endpoint, read_prompt
from vllm_suite.router.room import NoRoom, Room, Share


async def read_body(
    request: web.Request, guard: Guard, share: Share, config: RouterConfig, metrics: RouterMetrics
) -> bytes | web.Response:
    """The whole body, or the answer to a client whose body is too long, too slow or broken, or finds no room."""
    limits = config.limits
    guard.enter("client", config.timeouts.client_s)
    pieces: list[bytes] = []
    size = 0
    try:
        # Not `request.read`: it keeps what it has read for as long as there is a request.
        while piece := await request.content.readany():
            size += len(piece)
            if size > limits.body_bytes:
                metrics.count("rejected", "body_too_large")
                return error_response(413, f"the request body is longer than {limits.body_bytes} bytes")
            share.take(len(piece))
            pieces.append(piece)
        return b"".join(pieces)
    except NoRoom:
        return no_room(config, metrics)
    except asyncio.CancelledError:
        if guard.timeout() is None:
            raise
        metrics.count("timeouts", "client")
        return error_response(408, "the request body did not arrive in time")
    except web.RequestPayloadError:
        metrics.count("rejected", "bad_body")
        return error_response(400, "the request body cannot be read")


def announced(request: web.Request, room: Room, config: RouterConfig, metrics: RouterMetrics) -> web.Response | None:
    """The answer to a client that says how long its body is, where there is no room for it now."""
    length = request.content_length or 0
    if length > config.limits.body_bytes or room.fits(length):
        return None
    return no_room(config, metrics)


def no_room(config: RouterConfig, metrics: RouterMetrics) -> web.Response:
    """As for too many requests: a later one may find room."""
    metrics.count("rejected", "total_body_bytes")
    message = "the bodies of the requests inside the router leave no room for this one"
    return error_response(429, message, retry_after_s=config.limits.retry_after_s)


def make_job(
    request: web.Request,
    endpoint: Endpoint,
    body: bytes,
    guard: Guard,
    started: float,
    config: RouterConfig,
    keys: Keys,
    metrics: RouterMetrics,
    share: Share,
) -> Job:
    """Parse the body, take out transfer fields and control headers, settle the request id."""
    prompt = read_prompt(endpoint, body)
    if not config.trust_transfer_params:
        for name in strip_transfer_fields(prompt):
            metrics.count("stripped", name)
    elif prompt.document is not None and prompt.document.get("kv_transfer_params") is not None:
        prompt.whole_reason = "reference_given"
    rid = request_id(request.headers.get(REQUEST_ID))
    headers, stripped = upstream_headers(
        request.headers, rid, keys.upstream_header, forward_authorization=config.auth.forward_authorization
    )
    for _ in range(stripped):
        metrics.count("stripped", "control_header")
    return Job(request, prompt, headers, rid, guard, started, share)
