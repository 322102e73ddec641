"""The `roles` section of a fleet file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_suite.fleet.launch import plan_instances
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.roles.limits import ENV_LIMITS, parse


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
