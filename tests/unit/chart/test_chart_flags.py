"""An instance gets the arguments and the environment that `vllm-suite up` would give it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import yaml
from chart_render import CASES, container, env, files, find, render

from vllm_suite.fleet import launch
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.router.config import RouterConfig


def comparable(words: Sequence[str]) -> list[object]:
    """Words as they are; JSON as what it says, since two writers order its keys differently."""
    return [json.loads(word) if word.startswith("{") else word for word in words]


@pytest.mark.parametrize("name", CASES)
def test_same_command_as_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = CASES[name]
    cpu = values.get("kubernetes", {}).get("device") == "cpu"
    monkeypatch.setattr(launch, "visible_gpus", lambda: tuple(str(gpu) for gpu in range(64)))
    monkeypatch.setattr(launch, "vllm_command", lambda: "vllm")
    monkeypatch.setattr(launch, "_takes_media", lambda spec: None)
    for key in ("VLLM_API_KEY", "VLLM_SUITE_CONTROL_KEY", "VLLM_SUITE_UPSTREAM_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    local = {"local": {"device": "cpu" if cpu else "gpu"}}
    spec = parse_fleet(yaml.safe_dump({**values, **local}))
    objects = render(values)
    planned = {one.role: one for one in launch.plan_instances(spec)}
    assert planned
    for role, one in planned.items():
        workloads = [o for o in objects if o["metadata"]["name"] == f"llm-{role}" and o["kind"] == "LeaderWorkerSet"]
        if workloads:
            pod = workloads[0]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
            found = pod["spec"]["containers"][0]
            at = found["args"].index("--nnodes")
            args = found["args"][:at]
        else:
            found = container(find(objects, "Deployment", f"llm-{role}"))
            args = found["args"]
        host, port = one.argv.index("--host") + 1, one.argv.index("--port") + 1
        wanted = list(one.argv)
        wanted[host], wanted[port] = "0.0.0.0", "8000"
        assert comparable([*found["command"], *args]) == comparable(wanted)

        given = env(found)
        moved = {"VLLM_SUITE_INSTANCE_ID", "VLLM_API_KEY", "VLLM_SUITE_CONTROL_KEY", "VLLM_SUITE_FLEET_KEY"}
        placed = {name for name in one.env if "SIDE_CHANNEL" in name or name == "VLLM_HOST_IP"}
        for key, value in one.env.items():
            if key in placed:
                assert key in given
            elif key not in moved and not (key == "CUDA_VISIBLE_DEVICES" and not cpu):
                assert comparable([given[key]]) == comparable([value]), key
        secret = {entry["name"] for entry in found["env"] if "valueFrom" in entry}
        assert moved <= secret


@pytest.mark.parametrize("name", CASES)
def test_the_router_takes_its_file(name: str) -> None:
    objects = render(CASES[name])
    text = find(objects, "ConfigMap", "llm-router")["data"]["router.yaml"]
    config = RouterConfig.model_validate(yaml.safe_load(text))
    given = parse_fleet(yaml.safe_dump(CASES[name]))
    roles = {role for role, _ in given.pools.items()}
    names = {(one.host, one.port, one.role) for one in config.membership.dns}
    services = {(f"{one.service}.prod.svc", one.port, one.role) for one in config.membership.kubernetes}
    assert (services if name == "switching" else names) == {(f"llm-{role}.prod.svc", 8000, role) for role in roles}
    assert not (names and services)
    assert config.membership.state == ("suite" if given.plugins else "stock")
    assert config.host == "0.0.0.0"
    # Everything else is as the fleet file has it.
    same = {"membership", "auth", "host"}
    asked = given.router.model_copy(update={"slo": given.slo, "predicted": given.predicted})
    assert config.model_dump(exclude=same) == asked.model_dump(exclude=same)
    assert "client" not in text


def test_keys_of_the_file_reach_a_secret_alone() -> None:
    for name, key in (("scaled", "Y2xpZW50"), ("any", "Zg==")):  # base64 of client, f
        holding = [path for path, text in files(CASES[name]).items() if key in text]
        assert holding == ["vllm-suite/templates/access.yaml"]
    assert not [path for path, text in files(CASES["scaled"]).items() if '"client"' in text or "- client" in text]


def test_sizes_are_read_as_up_reads_them() -> None:
    from vllm_suite.fleet.units import parse_bytes

    for size in ("256MiB", "2GB", "1.5GiB", "100b", 268435456, " 3 KiB "):
        values = {"model": "m/m", "pools": {"decode": {}}, "engine": {"kv_cache_memory_bytes": size}}
        args = container(find(render(values), "Deployment", "llm-decode"))["args"]
        assert args[args.index("--kv-cache-memory-bytes") + 1] == str(parse_bytes(size))


def test_kubernetes_expands_nothing_in_what_the_file_says() -> None:
    values = {"model": "m/m", "pools": {"decode": {"engine": {"args": ["--x=$(HOME)"]}}}, "env": {"A": "$(B)"}}
    found = container(find(render(values), "Deployment", "llm-decode"))
    assert found["args"][-1] == "--x=$$(HOME)"
    assert env(found)["A"] == "$$(B)"
    assert env(found)["VLLM_HOST_IP"] == "$(POD_IP)"
