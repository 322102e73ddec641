"""``GET /suite/v1/state`` on every instance: who it is, whether it can serve, and how busy it is.

``/suite/v1/role`` is beside it; see :mod:`vllm_suite.compat.role_routes`.

Loaded by vLLM as the endpoint plugin ``vllm_suite_control``. The router asks twice a second, so an answer costs
a few reads in this process and at most one small call to the engine per half second.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
from collections.abc import Iterable
from typing import Any, Protocol

from vllm_suite import __version__
from vllm_suite.catalog import ENV_PLUGINS, PLUGINS
from vllm_suite.compat.allowlist import CONTROL
from vllm_suite.compat.engine_state import EngineProbe, Load, read_load
from vllm_suite.compat.key_guard import KeyGuard
from vllm_suite.compat.pull_totals import PullTotals
from vllm_suite.compat.role_routes import RoleRoutes
from vllm_suite.compat.role_work import read_work
from vllm_suite.compat.versions import installed_version
from vllm_suite.identity import identity

ENV_CONTROL_KEY = "VLLM_SUITE_CONTROL_KEY"
STATE_PATH = "/suite/v1/state"


class Exporter(Protocol):
    """What a plugin adds to an API server. Made once with the engine client, after the engine has started."""

    def facts(self) -> dict[str, Any]:
        """Keys for the state document."""

    async def run(self) -> None:
        """Runs beside the server until it returns; it has to contain its own failures."""


class Control:
    """vLLM's `EndpointPlugin`: vLLM calls `attach_router` when it builds the app, then `init_state` once."""

    name = CONTROL
    required_tasks = None

    def __init__(self) -> None:
        self._keys: tuple[bytes, ...] = ()
        self._engine: Any = None
        self._probe: EngineProbe | None = None
        self._fixed: dict[str, Any] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._roles = RoleRoutes()
        self._pulled = PullTotals()

    def attach_router(self, app: Any) -> None:
        """Add the route. The key is read here, where the app already carries its arguments."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        self._keys = control_keys(getattr(app.state, "args", None))

        def refusal(request: Request) -> JSONResponse | None:
            if authorized(request.headers.get("Authorization"), self._keys):
                return None
            return JSONResponse(UNAUTHORIZED, status_code=401, headers={"WWW-Authenticate": "Bearer"})

        async def state(request: Request) -> JSONResponse:
            return refusal(request) or JSONResponse(await self.state())

        # The module postpones annotations, and FastAPI resolves them by module globals.
        state.__annotations__ = {"request": Request, "return": JSONResponse}
        app.add_api_route(STATE_PATH, state, methods=["GET"], include_in_schema=False, response_model=None)
        self._roles.attach(app, refusal, lambda: bool(self._keys))
        own = instance_keys(getattr(app.state, "args", None))
        if own:
            app.add_middleware(KeyGuard, opens=lambda header: authorized(header, own))

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine client and what does not change. vLLM's render server has no engine: None."""
        self._engine = engine_client
        self._fixed = {"models": _served_names(args)}
        logging.getLogger("uvicorn.access").addFilter(_not_a_poll)
        if engine_client is None:
            return
        self._probe = EngineProbe(engine_client)
        config = engine_client.vllm_config
        transfer = config.kv_transfer_config
        self._fixed |= {
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "prefix_caching": bool(config.cache_config.enable_prefix_caching),
            "kv_connector": transfer.kv_connector if transfer is not None else None,
        }
        self._roles.start(engine_client, args, self._fixed["models"][0])
        for name in _selected():
            plugin = PLUGINS.get(name)
            if plugin is not None and plugin.exporter is not None:
                exporter: Exporter = plugin.exporter.load()(engine_client)
                self._fixed |= exporter.facts()
                self._tasks.append(asyncio.create_task(exporter.run(), name=f"vllm-suite {name}"))

    async def state(self) -> dict[str, Any]:
        """The document that is served. Load fields that are not known are left out."""
        me = identity()
        status = await self._probe.status() if self._probe is not None else None
        load: Load = await read_load(self._engine) if self._engine is not None else {}
        return {
            "instance_id": me.instance_id,
            "epoch": me.epoch,
            **self._roles.facts(),
            "ready": status is not None and status.ready and self._roles.door.state.phase == "serving",
            "draining": status is not None and status.paused,
            **self._fixed,
            "vllm": installed_version(),
            "suite": __version__,
            "plugins": _selected(),
            "load": load,
            "work": {"arrived": dict(self._roles.door.arrived), **read_work()} if self._engine is not None else {},
            "pulled": await self._pulled.read() if self._engine is not None else {},
        }


def create() -> Control:
    """Entry point of ``vllm.endpoint_plugins``."""
    return Control()


UNAUTHORIZED = {
    "error": {
        "message": "a valid control key is required: Authorization: Bearer <key>",
        "type": "AuthenticationError",
        "param": None,
        "code": 401,
    }
}


def control_keys(args: Any) -> tuple[bytes, ...]:
    """Digests of the keys that open the control routes; empty where they are open.

    ``VLLM_SUITE_CONTROL_KEY`` where set, else the instance's own ``--api-key`` values, else ``VLLM_API_KEY``.
    """
    control = os.environ.get(ENV_CONTROL_KEY)
    return (_digest(control),) if control else instance_keys(args)


def instance_keys(args: Any) -> tuple[bytes, ...]:
    """Digests of the keys that vLLM itself asks for; empty where it asks for none."""
    given: Iterable[str | None] = getattr(args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
    return tuple(_digest(key) for key in given if key)


def authorized(header: str | None, keys: tuple[bytes, ...]) -> bool:
    """Whether an ``Authorization`` header carries one of the keys. Takes the same time for every wrong key."""
    if not keys:
        return True
    scheme, _, token = (header or "").partition(" ")
    offered = _digest(token)
    matches = [hmac.compare_digest(offered, key) for key in keys]
    return scheme.lower() == "bearer" and any(matches)


def _not_a_poll(record: logging.LogRecord) -> bool:
    # uvicorn logs (client, method, path, HTTP version, status); two lines a second would bury everything else.
    args = record.args
    return not (isinstance(args, tuple) and len(args) == 5 and args[2] == STATE_PATH and args[4] == 200)


def _digest(key: str) -> bytes:
    # Digests have one length, so the comparison does not tell how long the key is.
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _selected() -> list[str]:
    return [name for name in os.environ.get(ENV_PLUGINS, "").split(",") if name]


def _served_names(args: Any) -> list[str]:
    return list(getattr(args, "served_model_name", None) or [args.model])
