"""The page, the recipe and the chart agree with the code."""

from __future__ import annotations

import re

import yaml
from chart_render import CHART, ROOT, find, render

from vllm_suite import __version__
from vllm_suite.compat.versions import SUPPORTED, series
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.reference import table

PAGE = (ROOT / "docs/kubernetes.md").read_text()


def test_the_page_holds_the_table() -> None:
    written = PAGE.partition("<!-- reference -->\n")[2]
    current = table(KubernetesSpec, "kubernetes.")
    assert written.strip() == current, "run: python -m vllm_suite.fleet.reference kubernetes"


def test_the_pages_example_is_a_fleet_that_renders() -> None:
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[0]
    parse_fleet(text)
    objects = render(yaml.safe_load(text))
    assert find(objects, "ScaledObject", "llm-decode")


def test_the_pages_gateway_is_a_part_of_a_fleet() -> None:
    text = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
    objects = render({"model": "org/model", "pools": {"decode": {}}, **yaml.safe_load(text)})
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
