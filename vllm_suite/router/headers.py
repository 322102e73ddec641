"""Headers that pass the router, in both directions."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from multidict import CIMultiDict, CIMultiDictProxy, istr

REQUEST_ID = istr("X-Request-Id")
_AUTHORIZATION = istr("Authorization")

# RFC 9110 7.6.1, and what the router sets itself.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_DROPPED_REQUEST = _HOP_BY_HOP | {
    "host",
    "content-length",
    "content-encoding",  # the server has undone it
    "authorization",
    "cookie",
    "expect",
    "x-request-id",
}
_DROPPED_RESPONSE = _HOP_BY_HOP | {"content-length", "date", "server", "set-cookie", "x-request-id"}

# Control headers: the suite's own, and those with which vLLM lets a caller choose an engine of a group.
_CONTROL_PREFIXES = ("x-suite-", "x-data-parallel-")

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}\Z")


def request_id(given: str | None) -> str:
    """The client's id where it is short and plain, otherwise a new one."""
    if given is not None and _SANE_ID.match(given):
        return given
    return os.urandom(16).hex()


def upstream_headers(
    incoming: CIMultiDictProxy[str], rid: str, authorization: str | None, *, forward_authorization: bool
) -> tuple[CIMultiDict[str], int]:
    """Headers for the instance, and how many control headers were taken out.

    Headers named in `Connection` are hop-by-hop as well and stay behind.
    """
    out: CIMultiDict[str] = CIMultiDict()
    stripped = 0
    named = _named_in_connection(incoming)
    for name, value in incoming.items():
        lower = name.lower()
        if lower in _DROPPED_REQUEST or lower in named:
            continue
        if lower.startswith("x-") and lower.startswith(_CONTROL_PREFIXES):
            stripped += 1
            continue
        out.add(name, value)
    out[REQUEST_ID] = rid
    if forward_authorization:
        authorization = incoming.get(_AUTHORIZATION)
    if authorization is not None:
        out[_AUTHORIZATION] = authorization
    return out, stripped


def _named_in_connection(incoming: CIMultiDictProxy[str]) -> Iterable[str]:
    value = incoming.get("Connection")
    if value is None or value.lower() in ("keep-alive", "close"):
        return ()
    return {name.strip().lower() for name in value.split(",")}


def downstream_headers(answer: CIMultiDictProxy[str], rid: str) -> CIMultiDict[str]:
    """Headers for the client."""
    out: CIMultiDict[str] = CIMultiDict()
    for name, value in answer.items():
        if name.lower() not in _DROPPED_RESPONSE:
            out.add(name, value)
    out[REQUEST_ID] = rid
    return out
