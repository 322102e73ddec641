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


async def read_body(
    request: web.Request, guard: Guard, config: RouterConfig, metrics: RouterMetrics
) -> bytes | web.Response:
    """The whole body, or the answer to a client whose body is too long, too slow or broken."""
    guard.enter("client", config.timeouts.client_s)
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        metrics.count("rejected", "body_too_large")
        return error_response(413, f"the request body is longer than {config.limits.body_bytes} bytes")
    except asyncio.CancelledError:
        if guard.timeout() is None:
            raise
        metrics.count("timeouts", "client")
        return error_response(408, "the request body did not arrive in time")
    except web.RequestPayloadError:
        metrics.count("rejected", "bad_body")
        return error_response(400, "the request body cannot be read")


def make_job(
    request: web.Request,
    endpoint: Endpoint,
    body: bytes,
    guard: Guard,
    started: float,
    config: RouterConfig,
    keys: Keys,
    metrics: RouterMetrics,
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
    return Job(request, prompt, headers, rid, guard, started)
