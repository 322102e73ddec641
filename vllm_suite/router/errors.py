"""Error bodies in the shape vLLM gives them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from aiohttp import web

# vLLM names the type after its exception where it has one and after the HTTP phrase elsewhere.
_TYPES = {503: "ServiceUnavailableError", 500: "InternalServerError"}
# An instance, or a proxy before it, may answer with a number that has no phrase.
_PHRASES = {status.value: status.phrase for status in HTTPStatus}


def error_bytes(status: int, message: str, param: str | None = None) -> bytes:
    """The body alone, for an event inside a stream or a whole response."""
    kind = _TYPES.get(status) or _PHRASES.get(status, "Error")
    # Words may quote the client, whose JSON may hold what is no Unicode.
    message = message.encode("utf-8", "backslashreplace").decode()
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": status}})


def error_response(
    status: int, message: str, *, param: str | None = None, retry_after_s: int | None = None
) -> web.Response:
    """A whole response; `retry_after_s` becomes the Retry-After header."""
    headers = None if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return web.Response(
        status=status,
        body=error_bytes(status, message, param),
        content_type="application/json",
        headers=headers,
    )


def unauthorized() -> web.Response:
    """What vLLM's own authentication answers."""
    return web.Response(status=401, body=b'{"error":"Unauthorized"}', content_type="application/json")


class StageTimeout(Exception):
    """A stage ran past its deadline; `stage` is the metric label."""

    def __init__(self, stage: str) -> None:
        super().__init__(f"{stage} timed out")
        self.stage = stage


class UpstreamFailure(Exception):
    """An instance gave no usable answer.

    `kind` is the metric label: `connect` (the request was never sent), `disconnect`, `timeout`, `protocol`,
    `role` (it does not do that work now, nothing was begun), `status` (then `status` and `body` hold what it
    answered), `engine_dead` (it says that its engine has ended), `auth`.
    """

    def __init__(self, kind: str, message: str, *, status: int = 502, body: bytes | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.body = body
