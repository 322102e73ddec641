"""`GET /ui`: the page, and `GET /ui/state`: what it shows.

The page and its parts carry no data and need no key. The state needs one where the router has one: the page asks for
it, keeps it in the tab, and sends it as `Authorization: Bearer`, so there is no cookie that another site could use.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.resources import files

import msgspec
from aiohttp import web

from vllm_suite.router.auth import Keys, allowed
from vllm_suite.router.errors import unauthorized
from vllm_suite.router.metrics import RouterMetrics
from vllm_suite.router.ui.state import LiveState

PATHS = ("/ui", "/ui/state")
_PARTS = {
    "app.js": "text/javascript",
    "dom.js": "text/javascript",
    "panels.js": "text/javascript",
    "path.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_encode = msgspec.json.Encoder().encode


class LiveRoutes:
    """Handlers; `add` puts them into an application."""

    def __init__(self, state: LiveState, keys: Keys, metrics: RouterMetrics) -> None:
        self._state = state
        # The control key opens it too: whoever may switch roles may look. It alone, where there are no API keys.
        self._keys = (*keys.client, *keys.control)
        self._metrics = metrics
        folder = files("vllm_suite.router.ui") / "page"
        self._parts = {name: (folder / name).read_bytes() for name in _PARTS}
        shell = (folder / "index.html").read_text(encoding="utf-8")
        self._shell = shell.replace("{{key}}", "required" if self._keys else "open").encode()

    def add(self, app: web.Application) -> None:
        """Register the routes."""
        app.router.add_get("/ui", self.page)
        app.router.add_get("/ui/state", self.state)
        for name in _PARTS:
            app.router.add_get(f"/ui/{name}", self.part)

    async def page(self, request: web.Request) -> web.Response:
        """GET /ui"""
        return _static(request, self._shell, "text/html")

    async def part(self, request: web.Request) -> web.Response:
        """GET /ui/<script, style or icon>"""
        name = request.path.rpartition("/")[2]
        return _static(request, self._parts[name], _PARTS[name])

    async def state(self, request: web.Request) -> web.Response:
        """GET /ui/state: `document.Live` as JSON."""
        if not allowed(request.headers.get("Authorization"), self._keys):
            self._metrics.count("rejected", "unauthorized")
            refusal = unauthorized()
            refusal.headers["Cache-Control"] = "no-store"
            return refusal
        headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=_encode(self._state.document()), content_type="application/json", headers=headers)


def _static(request: web.Request, body: bytes, kind: str) -> web.Response:
    tag = f'"{sha256(body).hexdigest()[:32]}"'
    # Asked about at each load: after an upgrade of the router no old script may read a new state.
    headers = {**_HEADERS, "Cache-Control": "no-cache", "ETag": tag}
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, content_type=kind, charset="utf-8", headers=headers)
