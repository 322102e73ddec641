"""The `roles` section of a fleet file."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from pydantic import ValidationError

from vllm_suite.fleet.assemble import plan, supervise
from vllm_suite.fleet.demo_spec import free_ports
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.fleet.launch import plan_instances
from vllm_suite.fleet.launch_front import controller_fleet, router_config
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.fleet.status import _controller, local_processes, table
from vllm_suite.fleet.supervisor import Supervisor
from vllm_suite.roles.limits import ENV_LIMITS, parse
from vllm_suite.roles.predict import PredictError


def spec(**roles: Any) -> FleetSpec:
    pools = {"any": {"replicas": 2}, "decode": {"replicas": 1}}
    return FleetSpec.model_validate({"model": "m", "pools": pools, "roles": roles, "local": {"device": "cpu"}})


def test_nothing_is_said_where_there_is_no_section() -> None:
    assert spec().roles.start.of("prefill") == 0
    assert spec().roles.floor.of("decode") == 1


@pytest.mark.parametrize(
    "roles", [{"start": {"prefill": 2, "decode": 1}}, {"start": {"encode": 1}}, {"every": 0}, {"rule": "luck"}]
)
def test_what_is_refused(roles: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="roles"):
        spec(**roles)


def test_limits_reach_the_instances_that_can_switch() -> None:
    limits = {"decode": {"max_num_batched_tokens": 512}}
    launches = plan_instances(spec(limits=limits, start={"prefill": 1, "decode": 1}))
    given = {one.name: one.env.get(ENV_LIMITS) for one in launches if one.role != "router"}
    assert given["fleet-decode-0"] is None
    assert parse(given["fleet-any-0"] or "").of("decode") == limits["decode"]
    assert json.loads(given["fleet-any-1"] or "")["prefill"] == {}


def controlled(tmp_path: Path, **over: Any) -> FleetSpec:
    found = spec(control=True, start={"prefill": 1}).model_dump(mode="json", exclude_unset=True)
    found["local"] |= {"log_dir": str(tmp_path), "controller_port": free_ports(1)}
    found["env"] = {"VLLM_SUITE_FLEET_KEY": "fleet-secret"}
    found["pools"]["any"]["env"] = {"HF_TOKEN": "hub-secret"}
    found["router"] = {"auth": {"api_keys": ["client-secret"], "control_key": "control-secret"}}
    return FleetSpec.model_validate(found | over)


def test_up_runs_the_controller_where_the_file_says_so(tmp_path: Path) -> None:
    wanted = controlled(tmp_path)
    launches = plan(wanted)
    assert [one.role for one in launches] == ["decode", "any", "any", "controller", "router"]
    controller = launches[3]
    assert controller.argv[3:7] == ("roles", "control", str(tmp_path / "controller.yaml"), "--url")
    assert controller.env["VLLM_SUITE_CONTROL_KEY"] == "control-secret"
    assert "secret" not in controller.shell()
    text = controller_fleet(wanted)
    assert "secret" not in text
    assert parse_fleet(text).roles == wanted.roles
    members = yaml.safe_load(router_config(wanted, launches[:-1]))["membership"]["static"]
    assert [one["role"] for one in members] == ["decode", "any", "any"]
    assert [one.role for one in plan(spec())] == ["decode", "any", "any", "router"]


def test_up_says_what_the_controller_lacks(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"roles.control: pools.any has no instance"):
        controlled(tmp_path, pools={"decode": {"replicas": 1}}, roles={"control": True})
    wanted = controlled(tmp_path, roles={"control": True, "rule": "goodput", "predict": {"hardware": "8xAbacus"}})
    with pytest.raises(PredictError, match=r"roles\.predict"):
        supervise(wanted)
    with pytest.raises(ValidationError, match="the metrics of the controller"):
        controlled(tmp_path, local={"controller_port": 8080}, router={"port": 8080})


async def test_the_controller_is_ready_and_shown(tmp_path: Path) -> None:
    """The real process, without a fleet: it looks, finds no router and goes on; status has its line."""
    wanted = controlled(tmp_path)
    supervise(wanted)
    alone = Supervisor([launch for launch in plan(wanted) if launch.role == "controller"], wanted.local)
    async with alone, aiohttp.ClientSession() as session:
        await alone.start()
        rows = local_processes(tmp_path)
        assert [(row["role"], row["state"]) for row in rows] == [("controller", "ready")]
        async with asyncio.timeout(20):
            while True:
                found = await _controller(session, rows)
                assert found is not None
                if found["looks"].get("no_router"):
                    break
                await asyncio.sleep(0.1)
    now = {"router": "r", "instances": [], "controller": {**found, "moves": {"begun": 2.0}}}
    assert str(table(now).caption) == "fleet-controller: ready, switches asked for: 2 begun"
