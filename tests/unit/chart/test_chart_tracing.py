"""Tracing in the chart: one key reaches the router and every instance, and the way to the collector is open."""

from __future__ import annotations

import yaml
from chart_render import container, env, find, fleet, render

from vllm_suite.router.config import RouterConfig

ENDPOINT = "http://collector.observability:4318/v1/traces"


def test_one_key_is_for_all_of_them() -> None:
    closed = {"network_policies": {"restrict_egress": True}, "model": {"claim": "weights"}}
    objects = render(fleet(model="/models/m", tracing={"endpoint": ENDPOINT, "sample": 0.1}, kubernetes=closed))
    for role in ("prefill", "decode"):
        found = container(find(objects, "Deployment", f"llm-{role}"))
        args = found["args"]
        assert args[args.index("--otlp-traces-endpoint") + 1] == ENDPOINT
        said = env(found)
        assert said["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
        assert said["OTEL_SERVICE_NAME"] == f"llm-{role}"
        # Kubernetes puts in what was given before it.
        names = [entry["name"] for entry in found["env"]]
        assert said["OTEL_RESOURCE_ATTRIBUTES"].endswith("service.instance.id=$(VLLM_SUITE_INSTANCE_ID)")
        assert names.index("VLLM_SUITE_INSTANCE_ID") < names.index("OTEL_RESOURCE_ATTRIBUTES")
    config = RouterConfig.model_validate(
        yaml.safe_load(find(objects, "ConfigMap", "llm-router")["data"]["router.yaml"])
    )
    assert config.tracing is not None
    assert (config.tracing.endpoint, config.tracing.sample) == (ENDPOINT, 0.1)
    assert env(container(find(objects, "Deployment", "llm-router")))["OTEL_SERVICE_NAME"] == "llm-router"
    for one in (found for found in objects if found["kind"] == "NetworkPolicy" and "egress" in found["spec"]):
        ports = {entry["port"] for rule in one["spec"]["egress"] for entry in rule.get("ports", [])}
        assert (4318 in ports) is (one["metadata"]["name"] != "llm-test"), one["metadata"]["name"]


def test_without_it_nothing_is_added() -> None:
    text = yaml.safe_dump(render(fleet()))
    assert "OTEL" not in text
    assert "otlp" not in text
