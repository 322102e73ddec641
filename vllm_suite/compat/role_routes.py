"""``/suite/v1/role`` on every instance: which role it has, and switching it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vllm_suite.catalog import ENV_PLUGINS
from vllm_suite.compat.role_engine import RoleEngine
from vllm_suite.compat.role_series import observe
from vllm_suite.identity import ROLES, Role, identity
from vllm_suite.roles.gate import Door, Gate
from vllm_suite.roles.instance import Switcher, SwitchError
from vllm_suite.roles.limits import ENV_LIMITS, parse
from vllm_suite.roles.state import Refused, RoleState

ROLE_PATH = "/suite/v1/role"
_LONGEST_BODY = 4096
_STATUS = {"stale": 409, "busy": 409, "out": 409, "noop": 200}


class RoleRoutes:
    """The part of the control endpoint that knows about roles. One per API server."""

    def __init__(self) -> None:
        self.door = Door(RoleState(identity().role))
        self.switcher: Switcher | None = None
        self.fixed: str | None = "the engine has not started"
        self._app: Any = None

    def attach(self, app: Any, refusal: Callable[[Any], Any], has_keys: Callable[[], bool]) -> None:
        """Add the gate and the routes. `refusal` gives the answer to a request without the key, or None."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        self._app = app
        app.add_middleware(Gate, door=self.door)

        async def get_role(request: Request) -> Any:
            return refusal(request) or JSONResponse(self.document())

        async def set_role(request: Request) -> Any:
            denied = refusal(request)
            if denied is not None:
                return denied
            if not has_keys():
                text = "switching needs a key: start the instance with VLLM_SUITE_CONTROL_KEY or --api-key"
                return JSONResponse({"error": text, "reason": "no_key"}, status_code=403)
            status, answer = self.set(await _short_body(request))
            return JSONResponse(answer, status_code=status)

        for route, method in ((get_role, "GET"), (set_role, "POST")):
            route.__annotations__ = {"request": Request, "return": Any}
            app.add_api_route(ROLE_PATH, route, methods=[method], include_in_schema=False, response_model=None)

    def start(self, client: Any, args: Any, model: str) -> None:
        """The engine runs. Raises ValueError where the limits in the environment make no sense."""
        limits = parse(os.environ.get(ENV_LIMITS, ""))
        self.fixed = why_fixed(client)
        if self.fixed is None:
            engine = RoleEngine(client, self._app, args, model, self.door, limits)
            self.switcher = Switcher(self.door, engine, able(client), ended=observe)

    def set(self, body: Any) -> tuple[int, dict[str, Any]]:
        """Begin a switch: status and answer. `outcome` is `begun`, `noop` or `refused`."""
        me = identity()
        wrong = _wrong(body)
        if wrong is not None:
            return 400, {"outcome": "refused", "reason": "malformed", "error": wrong}
        if body["epoch"] != me.epoch:
            text = f"the instance's epoch is {me.epoch}: it was restarted"
            return 409, {"outcome": "refused", "reason": "stale", "error": text, **self.document()}
        if self.switcher is None:
            return 409, {"outcome": "refused", "reason": "fixed", "error": self.fixed, **self.document()}
        try:
            self.switcher.begin(body["role"], body["role_epoch"], body.get("give_back", False))
        except Refused as refused:
            outcome = "noop" if refused.reason == "noop" else "refused"
            answer = {"outcome": outcome, "reason": refused.reason, "error": str(refused), **self.document()}
            return _STATUS[refused.reason], answer
        except SwitchError as error:
            return 409, {"outcome": "refused", "reason": "impossible", "error": str(error), **self.document()}
        return 202, {"outcome": "begun", **self.document()}

    def facts(self) -> dict[str, Any]:
        """Keys for the state document."""
        state = self.door.state
        return {
            "role": state.role,
            "role_epoch": state.epoch,
            "phase": state.phase,
            "target": state.target,
            "can": list(self.switcher.can) if self.switcher is not None else [state.role],
            "running": dict(self.door.inside),
        }

    def document(self) -> dict[str, Any]:
        """What `GET /suite/v1/role` answers."""
        me, last = identity(), self.switcher.last if self.switcher is not None else None
        return {
            "instance_id": me.instance_id,
            "epoch": me.epoch,
            **self.facts(),
            "fixed": self.fixed,
            "failure": self.door.state.failure,
            "refused": self.door.refused,
            "last": asdict(last) if last is not None else None,
        }


def why_fixed(client: Any) -> str | None:
    """Why the instance keeps its role for good; None where it can switch."""
    config = client.vllm_config
    if identity().role != "any":
        return f"it was started as {identity().role}; only instances started with role any can switch"
    if "disagg" not in os.environ.get(ENV_PLUGINS, "").split(","):
        return "without plugin disagg it can neither hand over nor take KV blocks"
    parallel = config.parallel_config
    if parallel.data_parallel_size > 1:
        return "several data-parallel engines cannot switch together yet"
    if parallel._api_process_count > 1:
        return "several API servers cannot switch together yet"
    return None


def able(client: Any) -> tuple[Role, ...]:
    """Roles that an instance can have which can switch."""
    config = client.vllm_config
    ec = getattr(config, "ec_transfer_config", None)
    encodes = ec is not None and ec.ec_role == "ec_both" and config.model_config.is_multimodal_model
    return ("encode", "prefill", "decode", "any") if encodes else ("prefill", "decode", "any")


def _wrong(body: Any) -> str | None:
    if not isinstance(body, dict) or set(body) - {"give_back"} != {"role", "epoch", "role_epoch"}:
        return "the body must be a JSON object with role, epoch and role_epoch, as GET gives them, and give_back or not"
    if body["role"] not in ROLES:
        return f"role must be one of {', '.join(ROLES)}"
    if not isinstance(body["epoch"], str) or type(body["role_epoch"]) is not int:
        return "epoch must be a string and role_epoch a whole number"
    if type(body.get("give_back", False)) is not bool:
        return "give_back must be true or false"
    return None


async def _short_body(request: Any) -> Any:
    taken = b""
    async for piece in request.stream():
        taken += piece
        if len(taken) > _LONGEST_BODY:
            return None
    try:
        return json.loads(taken)
    except (ValueError, RecursionError):
        return None
