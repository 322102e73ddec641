"""One HTTP call to an instance, with every way it can fail turned into `UpstreamFailure` or `StageTimeout`."""

from __future__ import annotations

import asyncio
import io

import aiohttp
import msgspec
from multidict import CIMultiDict, istr
from yarl import URL

from vllm_suite.roles.gate import REFUSED, REFUSED_HEADER, STAGE_HEADER
from vllm_suite.roles.state import Stage
from vllm_suite.router.config import RouterConfig
from vllm_suite.router.errors import StageTimeout, UpstreamFailure
from vllm_suite.router.guard import Guard

# uvicorn, in front of every vLLM, closes idle connections after 5 s; a request written to a connection that is
# just being closed is lost.
KEEPALIVE_S = 4.0
# How vLLM's EngineDeadError begins. Its server answers 500 with it, or ends a stream with it, until the process ends.
_ENGINE_DEAD = "EngineCore encountered an issue"
_STAGE = istr(STAGE_HEADER)
# Larger bodies go out in pieces, so that one long prompt does not hold the event loop.
_WHOLE_BYTES = 1 << 20
_READ_BYTES = 1 << 18

# Everything the client library raises for a call that came to nothing, and the watchdog's cancellation.
CLIENT_ERRORS = (
    asyncio.CancelledError,
    aiohttp.ClientError,
    aiohttp.http_exceptions.HttpProcessingError,
    OSError,
)


def open_session(config: RouterConfig) -> aiohttp.ClientSession:
    """The client session of a router: no pool limit, no cookies, no automatic headers, no decompression."""
    connector = aiohttp.TCPConnector(
        limit=0,
        ttl_dns_cache=10,
        keepalive_timeout=KEEPALIVE_S,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.timeouts.connect_s),
        read_bufsize=_READ_BYTES,
        max_line_size=65_536,
        max_field_size=65_536,
    )


def translate(exc: BaseException, guard: Guard) -> StageTimeout | UpstreamFailure | None:
    """What an exception of the client library means; None for a real cancellation, which must be raised on.

    Messages leave out the host and port that the library's own carry: they are no business of the client.
    """
    if isinstance(exc, asyncio.CancelledError):
        return guard.timeout()
    if isinstance(exc, aiohttp.ConnectionTimeoutError):
        return StageTimeout("connect")
    if isinstance(exc, aiohttp.ClientConnectorError):
        return UpstreamFailure("connect", "cannot connect to the instance")
    if isinstance(exc, (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError)):
        return UpstreamFailure("disconnect", "the instance closed the connection")
    return UpstreamFailure("protocol", "the instance did not speak HTTP")


async def send(
    session: aiohttp.ClientSession, url: URL, body: bytes, headers: CIMultiDict[str], stage: Stage
) -> aiohttp.ClientResponse:
    """POST and wait for the response's head; the instance is told the stage that it is asked for.

    Raises what `CLIENT_ERRORS` lists, for `translate`, and `UpstreamFailure` of kind `role` where the instance does not
    do that work now: it has begun nothing of the request.
    """
    data = body if len(body) <= _WHOLE_BYTES else io.BytesIO(body)
    headers = headers.copy()
    headers[_STAGE] = stage
    response = await session.post(url, data=data, headers=headers, allow_redirects=False)
    if response.status == 503 and response.headers.get(REFUSED_HEADER) == REFUSED:
        response.release()
        raise UpstreamFailure("role", f"no instance does {stage} now", status=503)
    return response


def failed_answer(status: int, body: bytes, stage: Stage) -> UpstreamFailure:
    """What an error body of vLLM means: `engine_dead`, a 503 in our own words, or `status` with what it said."""
    if status == 500 and _message(body).startswith(_ENGINE_DEAD):
        words = f"the engine of the {stage} instance has ended and no other took the request"
        return UpstreamFailure("engine_dead", words, status=503)
    return UpstreamFailure("status", "the instance failed", status=status, body=body)


def _message(body: bytes) -> str:
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return ""


async def read_all(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The whole body. Raises `UpstreamFailure` where it is longer than `limit` bytes."""
    pieces: list[bytes] = []
    size = 0
    while piece := await response.content.readany():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise UpstreamFailure("protocol", "the instance's answer is too long")
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
