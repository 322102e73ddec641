"""From an instance's answer to the client: the first byte decides, after it nothing is retried."""

from __future__ import annotations

from dataclasses import dataclass

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from vllm_suite.router.config import RouterConfig
from vllm_suite.router.errors import StageTimeout, UpstreamFailure, error_bytes
from vllm_suite.router.guard import Guard
from vllm_suite.router.headers import downstream_headers
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.upstream import CLIENT_ERRORS, failed_answer, read_all, send, translate

_EVENT_STREAM = "text/event-stream"
_ERROR_EVENT = b'data: {"error"'
# asyncio's high-water mark: a write that stays below it does not wait for the client.
_WRITE_BUFFER_BYTES = 65_536


class ClientGone(Exception):
    """The client's connection closed while it was written to."""


@dataclass(slots=True)
class Opened:
    """An answer that has begun: its head, and either all of its body or the first piece."""

    response: aiohttp.ClientResponse
    first: bytes
    whole: bool
    tail: bytes = b""  # the last three pieces of a stream: its last token, usage and [DONE]
    ended: bool = False  # the instance gave all of it
    broken: str = ""  # why it broke off after its first byte, as a metric label
    instance: str = ""  # which one, for what is said of an answer that broke off
    measured: tuple[int, str] | None = None  # see `lengths.measure`


async def open_answer(
    session: aiohttp.ClientSession,
    url: URL,
    body: bytes,
    headers: CIMultiDict[str],
    guard: Guard,
    config: RouterConfig,
    *,
    past_role: bool = False,
) -> Opened:
    """Send to decode and wait for the first byte of the body; the caller closes the response.

    `past_role` waits for the second event of a stream. vLLM begins a chat stream with an event that names the role
    only, and sends it even where the request then fails before its first token.

    Raises `UpstreamFailure` or `StageTimeout` while nothing has reached the client. Closing a response that was
    not read to its end closes the connection, which makes vLLM abort the request.
    """
    response: aiohttp.ClientResponse | None = None
    try:
        guard.enter("first_byte", config.timeouts.first_byte_s)
        response = await send(session, url, body, headers, "decode")
        status, length = response.status, response.content_length
        limit = config.limits.buffered_answer_bytes
        whole = status >= 400 or (length is not None and length <= limit)
        first = await (read_all(response, limit) if whole else response.content.readany())
        if status >= 500 or status == 429:
            raise failed_answer(status, first, "decode")
        if status in (401, 403) and not config.auth.forward_authorization:
            raise UpstreamFailure("auth", "the instance refused the router's key")
        if not whole and past_role and response.content_type == _EVENT_STREAM:
            first = await _second_event(response, first)
        if not whole and first.startswith(_ERROR_EVENT) and (failure := _server_error(first)) is not None:
            raise failure  # the stream has given nothing yet, so it counts as a failed answer
        return Opened(response, first, whole)
    except BaseException as exc:
        if response is not None:
            response.close()
        known = translate(exc, guard) if isinstance(exc, CLIENT_ERRORS) else None
        if known is None:
            raise
        raise known from exc


async def _second_event(response: aiohttp.ClientResponse, first: bytes) -> bytes:
    """The stream's beginning up to the end of its second event; the error event alone where that is one."""
    while first.count(b"\n\n") < 2 and len(first) < _WRITE_BUFFER_BYTES:
        piece = await response.content.readany()
        if not piece:
            return first
        first += piece
    _, _, rest = first.partition(b"\n\n")
    return rest if rest.startswith(_ERROR_EVENT) else first


def _server_error(events: bytes) -> UpstreamFailure | None:
    """The server error that the last error event in a part of a stream tells of, if there is one."""
    _, mark, rest = events.rpartition(_ERROR_EVENT)
    if not mark:
        return None
    event = (mark + rest)[len(b"data: ") :].split(b"\n", 1)[0]
    try:
        code = msgspec.json.decode(event)["error"]["code"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None
    return failed_answer(code, event, "decode") if isinstance(code, int) and 500 <= code <= 599 else None


async def relay(
    request: web.Request,
    answer: Opened,
    rid: str,
    guard: Guard,
    config: RouterConfig,
    metrics: RouterMetrics,
) -> web.StreamResponse:
    """Write an opened answer to the client, pieces as they come. Raises `ClientGone`.

    When the instance breaks off, an event stream ends with an error event and without `[DONE]`; any other body
    is cut off, so that the client cannot take it for complete. A stream that the instance itself ended with a server
    error passes as it is and counts as broken off.
    """
    source = answer.response
    headers = downstream_headers(source.headers, rid)
    if answer.whole:
        answer.ended = True
        return web.Response(status=source.status, body=answer.first, headers=headers)
    out = web.StreamResponse(status=source.status, headers=headers)
    content = source.content
    idle_s, client_s = config.timeouts.idle_s, config.timeouts.client_s
    piece = last = answer.first
    earlier = before = b""
    try:
        guard.enter("client", client_s)
        await out.prepare(request)
        guard.enter("idle", idle_s)
        while piece:
            transport = request.transport
            if transport is None:
                raise ClientGone
            if transport.get_write_buffer_size() + len(piece) < _WRITE_BUFFER_BYTES:
                await out.write(piece)
                guard.alive = True
            else:
                guard.enter("client", client_s)
                await out.write(piece)
                guard.enter("idle", idle_s)
            earlier, before, last = before, last, piece
            piece = await content.readany()
        told = _server_error(earlier + before + last)
        answer.ended = told is None
        if told is not None:
            _note_broken(answer, told.kind, rid, metrics)
        guard.enter("client", client_s)
        await out.write_eof()
    except aiohttp.ClientConnectionResetError as exc:
        raise ClientGone from exc
    except CLIENT_ERRORS as exc:
        failure = translate(exc, guard)
        if failure is None:
            raise
        reason = failure.stage if isinstance(failure, StageTimeout) else failure.kind
        _note_broken(answer, reason, rid, metrics)
        await _break_off(request, out, last, failure, reason, guard, client_s, metrics)
    finally:
        answer.tail = earlier + before + last
    return out


def _note_broken(answer: Opened, reason: str, rid: str, metrics: RouterMetrics) -> None:
    answer.broken = reason
    metrics.count("stream_errors", reason)
    if reason != "client":
        metrics.recent.note("recovery", "broken_off", reason, answer.instance, rid)


async def _break_off(
    request: web.Request,
    out: web.StreamResponse,
    last: bytes,
    failure: UpstreamFailure | StageTimeout,
    reason: str,
    guard: Guard,
    client_s: float,
    metrics: RouterMetrics,
) -> None:
    timed_out = isinstance(failure, StageTimeout)
    if timed_out:
        metrics.count("timeouts", reason)
    out.force_close()
    if reason != "client" and out.content_type == _EVENT_STREAM:
        # A blank line ends the event that the instance may have left half written.
        gap = b"" if last.endswith(b"\n\n") else b"\n\n"
        message = f"the decode instance stopped in mid-stream: {failure}"
        event = b"%bdata: %b\n\n" % (gap, error_bytes(504 if timed_out else 502, message))
        guard.enter("client", client_s)
        try:
            await out.write(event)
            await out.write_eof()
        except aiohttp.ClientConnectionResetError as exc:
            raise ClientGone from exc
    elif request.transport is not None:
        request.transport.abort()
