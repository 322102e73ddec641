"""Asks for the instance's key where vLLM does not.

vLLM guards paths by their beginning (`/v1`, `/v2` and a few more) and leaves the rest open, `/invocations` among them,
which generates, and `/tokenize`. With a key set, whatever is no reading needs it here, so that a route which vLLM adds
is not open either. Reading stays as vLLM has it: health, metrics, version.
"""

from __future__ import annotations

from collections.abc import Callable

from vllm_suite.roles.visit import App, Receive, Scope, Send

_READS = ("GET", "HEAD", "OPTIONS")
# The control routes have a key of their own; SageMaker posts to /ping to ask for health.
_OWN, _PING = "/suite/v1/", "/ping"
# As vLLM's own.
_BODY = b'{"error":"Unauthorized"}'
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]


class KeyGuard:
    """An ASGI middleware; `opens` says whether the value of an Authorization header does."""

    def __init__(self, app: App, opens: Callable[[str | None], bool]) -> None:
        self._app = app
        self._opens = opens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READS or self._free(scope) or self._opens(_given(scope)):
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 401, "headers": _HEADERS})
        await send({"type": "http.response.body", "body": _BODY})

    def _free(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return bool(path == _PING or path.startswith(_OWN))


def _given(scope: Scope) -> str | None:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"), None)
