"""The page, the recipe and the chart agree with the code."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from chart_render import CHART, ROOT, container, find, render

from vllm_suite import __version__
from vllm_suite.compat.versions import SUPPORTED, series
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.reference import table

PAGE = (ROOT / "docs/kubernetes.md").read_text()
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_holds_the_table() -> None:
    written = PAGE.partition("<!-- reference -->\n")[2]
    current = table(KubernetesSpec, "kubernetes.")
    assert written.strip() == current, "run: python -m vllm_suite.fleet.reference kubernetes"


def test_the_pages_example_is_a_fleet_that_renders() -> None:
    text = YAML[1]
    parse_fleet(text)
    objects = render(yaml.safe_load(text))
    assert find(objects, "ScaledObject", "llm-decode")


def test_a_plan_and_the_pages_file_of_the_cluster_are_a_release(planned: dict[str, Path]) -> None:
    plan, cluster = yaml.safe_load(planned["planned pd"].read_text()), yaml.safe_load(YAML[0])
    assert not plan["kubernetes"].keys() & cluster["kubernetes"].keys(), "a new plan would not replace the old one's"
    objects = render({**plan, "kubernetes": {**plan["kubernetes"], **cluster["kubernetes"]}})
    one = container(find(objects, "Deployment", "llm-decode"))
    assert one["image"] == f"REGISTRY/vllm-suite:{__version__}"
    (token,) = [entry["valueFrom"]["secretKeyRef"] for entry in one["env"] if entry["name"] == "HF_TOKEN"]
    assert token == {"name": "hub", "key": "token"}


def test_no_page_gives_a_release_values_that_its_next_upgrade_forgets() -> None:
    """Helm does: an upgrade with files knows nothing of what an earlier --set said."""
    commands = [
        line
        for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for line in path.read_text().splitlines()
        if re.search(r"helm (install|upgrade) llm ", line)
    ]
    assert len(commands) > 4
    for command in commands:
        assert "-f fleet.yaml -f cluster.yaml" in command
        assert "--set" not in command


def test_the_pages_gateway_is_a_part_of_a_fleet() -> None:
    objects = render({"model": "org/model", "pools": {"decode": {}}, **yaml.safe_load(YAML[2])})
    assert find(objects, "HTTPRoute", "llm-router")
    assert find(objects, "InferencePool", "llm-router")


def test_the_chart_has_the_suites_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def test_the_recipe_starts_from_a_supported_vllm() -> None:
    recipe = (ROOT / "packaging/container/Dockerfile").read_text()
    (version,) = re.findall(r"^ARG BASE=vllm/vllm-openai:v(\S+)$", recipe, re.MULTILINE)
    assert series(version) in SUPPORTED
    assert (ROOT / ".dockerignore").read_text().split() == ["*", "!dist"]
