"""The commands and files of what stands before the instances: the router, and the controller of role switching."""

from __future__ import annotations

import sys
from typing import Literal

import yaml

from vllm_suite.fleet.files import dump_fleet
from vllm_suite.fleet.keys import ENV_CLIENT_KEY, ENV_CONTROL_KEY, ENV_UPSTREAM_KEY, FleetKeys
from vllm_suite.fleet.launch import Launch, in_url, traced
from vllm_suite.fleet.spec import FleetSpec, PoolSpec
from vllm_suite.handoff import FLEET_KEY_ENV
from vllm_suite.router.config import Auth, Membership, StaticTarget

WITHDRAWN_FILE = "withdrawn"
"""In `local.log_dir`: addresses that the router leaves out while their instances are restarted."""


def plan_router(spec: FleetSpec, instances: list[Launch]) -> Launch:
    """The router's command; `write_router_config` must have written its file before it is started."""
    path = spec.local.log_dir / "router.yaml"
    keys = FleetKeys.resolve(spec.router.auth)
    host = spec.router.host
    reach = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return Launch(
        name=f"{spec.name}-router",
        role="router",
        argv=(sys.executable, "-m", "vllm_suite.cli.main", "router", "--config", str(path)),
        url=f"http://{in_url(reach)}:{spec.router.port}",
        log=spec.local.log_dir / f"{spec.name}-router.log",
        ready="router",
        env={
            "PYTHONUNBUFFERED": "1",
            **(traced(spec, "router", f"{spec.name}-router") if spec.tracing is not None else {}),
            **_fleet_key(spec),
            **_router_keys(keys),
        },
        unset=(),
        ports=(spec.router.port,) if spec.router.port else (),
        control_key=keys.router_control,
    )


def plan_controller(spec: FleetSpec, router: Launch) -> Launch:
    """The controller's command; `controller_fleet` must have been written to its file before it is started."""
    path, port = spec.local.log_dir / "controller.yaml", spec.local.controller_port
    argv = (sys.executable, "-m", "vllm_suite.cli.main", "roles", "control", str(path), "--url", router.url)
    return Launch(
        name=f"{spec.name}-controller",
        role="controller",
        argv=(*argv, "--metrics-port", str(port)),
        url=f"http://127.0.0.1:{port}",
        log=spec.local.log_dir / f"{spec.name}-controller.log",
        ready="metrics",
        env={"PYTHONUNBUFFERED": "1", **_router_keys(FleetKeys.resolve(spec.router.auth))},
        unset=(),
        ports=(port,),
    )


def controller_fleet(spec: FleetSpec) -> str:
    """The fleet as the controller reads it: without variables of instances and without keys, which its own environment
    has.
    """
    pools: dict[str, PoolSpec] = {role: pool.model_copy(update={"env": {}}) for role, pool in spec.pools.items()}
    open_ = spec.router.model_copy(update={"auth": Auth()})
    return dump_fleet(
        spec.model_copy(update={"env": {}, "router": open_, "pools": spec.pools.model_copy(update=pools)})
    )


def _fleet_key(spec: FleetSpec) -> dict[str, str]:
    """Of the instances' environment the one entry that the router has to share: without it none answers its questions,
    and what it signs is refused.
    """
    key = spec.env.get(FLEET_KEY_ENV)
    return {} if key is None else {FLEET_KEY_ENV: key}


def _router_keys(keys: FleetKeys) -> dict[str, str]:
    """Keys reach the router by its environment, not by another file."""
    named = {ENV_CLIENT_KEY: keys.client, ENV_UPSTREAM_KEY: keys.upstream, ENV_CONTROL_KEY: keys.control}
    return {name: key for name, key in named.items() if key}


def router_config(spec: FleetSpec, instances: list[Launch]) -> str:
    """The router's settings as YAML, the instances as its members and no keys in it."""
    targets = [
        StaticTarget(url=launch.url, role=launch.role)
        for launch in instances
        if launch.role != "router" and launch.role != "controller"
    ]
    given = spec.router.membership
    state: Literal["suite", "stock"] = "suite" if spec.plugins else "stock"
    own = {"static": (*given.static, *targets), "state": state, "withdrawn_file": spec.local.log_dir / WITHDRAWN_FILE}
    members = Membership.model_validate({**given.model_dump(), **own})
    update = {"membership": members, "slo": spec.slo, "predicted": spec.predicted, "tracing": spec.tracing}
    config = spec.router.model_copy(update=update)
    data = config.model_dump(mode="json", exclude={"auth": {"api_keys", "upstream_api_key", "control_key"}})
    return yaml.safe_dump(data, sort_keys=False)
