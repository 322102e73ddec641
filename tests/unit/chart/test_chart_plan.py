"""One file all the way: `vllm-suite plan` writes it, `up` takes it, the chart renders it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from chart_objects import validate
from chart_render import PLANS, container, find, render

from vllm_suite.cli.main import main
from vllm_suite.fleet.files import load_fleet

VERSIONS = ("1.29", "1.32", "1.34", "1.37")


@pytest.fixture
def path(planned: dict[str, Path]) -> Path:
    return planned["planned pd"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PLANS)
def test_every_object_of_a_plan_is_valid(name: str, version: str, planned: dict[str, Path]) -> None:
    objects = render(yaml.safe_load(planned[name].read_text()), f"v{version}.0")
    assert len(objects) > 10
    for found in objects:
        validate(found, version)


def test_the_shape_of_the_plan_is_that_of_the_release(planned: dict[str, Path]) -> None:
    kinds = ("Deployment", "LeaderWorkerSet")
    found = {}
    for name in PLANS:
        objects = [one for one in render(yaml.safe_load(planned[name].read_text())) if one["kind"] in kinds]
        found[name] = {one["metadata"]["name"].removeprefix("llm-"): one["kind"] for one in objects}
    assert found["planned colocated"] == {"any": "Deployment", "router": "Deployment"}
    assert found["planned pd"] == {"prefill": "Deployment", "decode": "Deployment", "router": "Deployment"}
    assert found["planned epd"] == {
        "encode": "Deployment",
        "prefill": "LeaderWorkerSet",
        "decode": "LeaderWorkerSet",
        "router": "Deployment",
    }
    (wide,) = [
        one for one in render(yaml.safe_load(planned["planned epd"].read_text()))
        if (one["kind"], one["metadata"]["name"]) == ("LeaderWorkerSet", "llm-decode")
    ]  # fmt: skip
    template = wide["spec"]["leaderWorkerTemplate"]
    assert template["size"] == 2
    leader = template["leaderTemplate"]["spec"]["containers"][0]
    assert leader["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert leader["args"][leader["args"].index("--tensor-parallel-size") + 1] == "16"


@pytest.mark.parametrize("name", PLANS)
def test_up_takes_each(name: str, planned: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", str(planned[name]), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for role, pool in load_fleet(planned[name]).pools.items():
        assert said.count(f"# planned-{role}-") == pool.replicas


def test_what_was_predicted_is_in_the_file(path: Path) -> None:
    predicted = load_fleet(path).predicted
    assert predicted is not None
    assert predicted.rate > 0
    assert (predicted.error, predicted.source) == (0.25, "roofline")
    for times in (predicted.ttft, predicted.tpot):
        assert times is not None
        assert times.p50_low is not None
        assert times.p50_high is not None
        # A quarter either way and more of it is what the error bar of a step does to a median.
        assert times.p50_low < 0.8 * times.p50
        assert times.p50_high > 1.2 * times.p50
        assert times.p50 <= times.p99
    assert predicted.ttft is not None
    assert predicted.ttft.p99 < 200  # the plan holds its targets


def test_up_takes_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", str(path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "planned-prefill-0" in said
    assert "planned-decode-0" in said
    assert "--max-num-batched-tokens 2048" in said


def test_the_chart_renders_it_as_it_is(path: Path) -> None:
    objects = render(yaml.safe_load(path.read_text()))
    for role, pool in load_fleet(path).pools.items():
        workload = find(objects, "Deployment", f"llm-{role}")
        assert workload["spec"]["replicas"] == pool.replicas
        args = container(workload)["args"]
        assert args[args.index("--max-num-batched-tokens") + 1] == "2048"
    rules = find(objects, "PrometheusRule", "llm")["spec"]["groups"][0]["rules"]
    assert {"VllmSuiteSloBurn", "VllmSuitePredictionLeft"} <= {rule["alert"] for rule in rules}
    given = yaml.safe_load(find(objects, "ConfigMap", "llm-router")["data"]["router.yaml"])
    assert given["slo"]["ttft"] == "200ms"


def test_pods_stay_in_the_domain_that_was_simulated(path: Path) -> None:
    """Two engines within one node of the plan: KV blocks went over its own links."""
    spec = load_fleet(path).kubernetes
    assert (spec.gpus_per_node, spec.placement.same_domain) == (8, "kubernetes.io/hostname")
    for role in ("prefill", "decode"):
        pod = find(render(yaml.safe_load(path.read_text())), "Deployment", f"llm-{role}")["spec"]["template"]["spec"]
        (term,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert term["podAffinityTerm"]["topologyKey"] == "kubernetes.io/hostname"
        assert "topologySpreadConstraints" not in pod  # which would pull the other way
