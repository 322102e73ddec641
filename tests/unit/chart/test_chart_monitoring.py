"""What the chart ships for Prometheus and Grafana."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from chart_render import CASES, find, fleet, render
from prometheus import promtool

from vllm_suite.fleet.files import parse_fleet
from vllm_suite.observability.dashboards import DASHBOARDS
from vllm_suite.observability.grafana import to_json
from vllm_suite.observability.rules import rule_file


@pytest.mark.parametrize("name", CASES)
def test_the_charts_rules_are_those_of_the_table(name: str) -> None:
    rules = find(render(CASES[name]), "PrometheusRule", "llm")["spec"]["groups"][0]["rules"]
    wanted = rule_file(parse_fleet(yaml.safe_dump(CASES[name])), 'fleet="llm",namespace="prod"')
    assert rules == wanted["groups"][0]["rules"]


def test_promtool_takes_the_rendered_rules(tmp_path: Path) -> None:
    found = find(render(CASES["large"]), "PrometheusRule", "llm")["spec"]
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(found))
    # Two burn rates share a name; labels tell them apart.
    said = promtool("check", "rules", str(path))
    assert f"{len(found['groups'][0]['rules'])} rules found" in said
    path.write_text(path.read_text().replace("sum(", "sum((", 1))
    with pytest.raises(AssertionError, match="could not parse expression"):
        promtool("check", "rules", str(path))


def test_dashboards_are_config_maps_that_a_sidecar_finds() -> None:
    objects = render(CASES["plain"], apis=())
    for dashboard in DASHBOARDS:
        found = find(objects, "ConfigMap", f"llm-dashboard-{dashboard.name}")
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(found["data"][f"{dashboard.name}.json"]) == to_json(dashboard)
    without = render(fleet(kubernetes={"monitoring": {"dashboards": False}}))
    assert not [one for one in without if "-dashboard-" in one["metadata"]["name"]]
    other = render(fleet(kubernetes={"monitoring": {"dashboard_labels": {"grafana_dashboard": "yes"}}}))
    assert find(other, "ConfigMap", "llm-dashboard-epd")["metadata"]["labels"]["grafana_dashboard"] == "yes"


def test_a_pool_that_scales_is_held_to_its_least_size() -> None:
    rules = find(render(CASES["scaled"]), "PrometheusRule", "llm")["spec"]["groups"][0]["rules"]
    floors = {one["labels"]["role"]: one["expr"] for one in rules if one["alert"] == "VllmSuitePoolBelowFloor"}
    assert floors["decode"].endswith("< 2")
    assert floors["prefill"].endswith("< 1")
