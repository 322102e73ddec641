"""Who may do what at the Kubernetes API: what the code does there, by name, and nothing else."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import yaml
from chart_render import CASES, container, find, fleet, render

from vllm_suite.cli import roles as roles_cli
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.kube.verbs import RIGHTS, verbs

RBAC = {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"}


def granted(role: dict[str, Any]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


@pytest.mark.parametrize("name", [name for name in CASES if name != "switching"])
def test_no_rights_where_nothing_asks_the_api(name: str) -> None:
    objects = render(CASES[name])
    assert not {found["kind"] for found in objects} & RBAC
    assert not any(one["automountServiceAccountToken"] for one in objects if one["kind"] == "ServiceAccount")


def test_roles_are_the_table() -> None:
    objects = render(CASES["switching"])
    assert {found["kind"] for found in objects} & RBAC == {"Role", "RoleBinding"}
    router, controller = (find(objects, "Role", f"llm-{name}") for name in ("router", "controller"))
    assert granted(router) == verbs("router")
    # Of the two kinds of workloads the one that pools.any is here.
    assert granted(controller) == {right for right in verbs("controller") if right[0] != "leaderworkerset.x-k8s.io"}
    large = {"any": {"engine": {"tensor_parallel_size": 16}}}
    objects = render(fleet(pools=large, roles={"control": True, "scale": {"gpus": 64}}))
    assert granted(find(objects, "Role", "llm-controller")) == {
        right for right in verbs("controller") if right[0] != "apps"
    }
    assert "--scale=lws/llm-any" in container(find(objects, "Deployment", "llm-controller"))["args"]
    # Without roles.scale no right to scale.
    objects = render(fleet(pools=large, roles={"control": True}))
    assert {one[1] for one in granted(find(objects, "Role", "llm-controller"))} == {"leases"}


def test_rights_are_for_named_objects() -> None:
    rules = find(render(CASES["switching"]), "Role", "llm-controller")["rules"]
    named = {(rule["resources"][0], tuple(rule["verbs"])): rule.get("resourceNames") for rule in rules}
    assert named == {
        ("leases", ("create",)): None,
        ("leases", ("get", "update")): ["llm-controller"],
        ("deployments/scale", ("patch",)): ["llm-any"],
    }
    assert {right.names for right in RIGHTS["controller"]} == {"", "lease", "any"}


def test_bindings_join_role_and_account() -> None:
    objects = render(CASES["switching"])
    for name in ("router", "controller"):
        binding = find(objects, "RoleBinding", f"llm-{name}")
        assert binding["roleRef"]["name"] == f"llm-{name}"
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": f"llm-{name}", "namespace": "prod"}]
        assert find(objects, "ServiceAccount", f"llm-{name}")
        pod = find(objects, "Deployment", f"llm-{name}")["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == f"llm-{name}"
    assert find(objects, "ServiceAccount", "llm-instance")["automountServiceAccountToken"] is False


def test_the_controller_reads_the_fleet_and_no_secret() -> None:
    objects = render(CASES["switching"])
    text = find(objects, "ConfigMap", "llm-controller")["data"]["fleet.yaml"]
    found, given = parse_fleet(text), parse_fleet(yaml.safe_dump(CASES["switching"]))
    assert (found.roles, found.slo, found.engine) == (given.roles, given.slo, given.engine)
    assert found.pools.any is not None
    assert found.pools.any.replicas == 4
    assert "hidden" not in text
    assert "- client" not in text


def test_the_controller_is_started_as_its_command_line_says() -> None:
    one = container(find(render(CASES["switching"]), "Deployment", "llm-controller"))
    assert one["command"] == ["vllm-suite"]
    assert one["args"][0] == "roles"
    parser = argparse.ArgumentParser(exit_on_error=False)
    roles_cli.add_arguments(parser)
    args = parser.parse_args(one["args"][1:])
    assert args.scale == "deployment/llm-any"
    assert args.lease == find(render(CASES["switching"]), "Role", "llm-controller")["rules"][1]["resourceNames"][0]
    assert (args.url, args.metrics_host, args.metrics_port) == ("http://llm-router:80", "0.0.0.0", 9101)
    assert {entry["name"] for entry in one["env"] if "valueFrom" in entry} == {"VLLM_SUITE_CONTROL_KEY"}


def test_the_controller_reaches_routers_instances_and_the_api_server() -> None:
    objects = render(CASES["switching"])
    to_instances = find(objects, "NetworkPolicy", "llm-instances")["spec"]["ingress"][2]
    to_routers = find(objects, "NetworkPolicy", "llm-router")["spec"]["ingress"][0]
    for rule in (to_instances, to_routers):
        components = [
            peer["podSelector"].get("matchLabels", {}).get("app.kubernetes.io/component") for peer in rule["from"]
        ]
        assert "controller" in components
    spec = find(objects, "NetworkPolicy", "llm-controller")["spec"]
    assert [port["port"] for port in spec["ingress"][0]["ports"]] == [9101]
    assert [port["port"] for port in spec["egress"][-1]["ports"]] == [53, 53, 443, 6443]
    router = find(objects, "NetworkPolicy", "llm-router")["spec"]["egress"][-1]
    assert [port["port"] for port in router["ports"]] == [53, 53, 443, 6443]
    plain = find(render(CASES["plain"]), "NetworkPolicy", "llm-router")["spec"]["egress"][-1]
    assert [port["port"] for port in plain["ports"]] == [53, 53]
