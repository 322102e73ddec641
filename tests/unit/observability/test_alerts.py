"""Alerts and dashboards ask for series that there are, fire when they should, and the chart ships them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus import promtool

from vllm_suite.fleet.files import parse_fleet
from vllm_suite.metrics import GROUPS
from vllm_suite.observability.__main__ import chart_files, main
from vllm_suite.observability.alerts import ALERTS
from vllm_suite.observability.dashboards import DASHBOARDS, GOODPUT
from vllm_suite.observability.grafana import expressions, to_json
from vllm_suite.observability.rules import rule_file

ROOT = Path(__file__).parents[3]
CHART = ROOT / "charts/vllm-suite"
SPECS = {spec.name: (group, spec) for group in GROUPS for spec in group.specs}
FLEET = parse_fleet(
    yaml.safe_dump(
        {
            "name": "llm",
            "model": "m",
            "plugins": ["disagg", "epd", "swiftkv", "dler"],
            "pools": {"encode": {}, "prefill": {"replicas": 2}, "decode": {}, "any": {"replicas": 2}},
            "slo": {"ttft": "300ms", "tpot": "40ms"},
            "predicted": {
                "rate": 2.0,
                "error": 0.2,
                "source": "roofline",
                "ttft": {"p50": "100ms", "p99": "200ms", "p99_high": "300ms"},
                "tpot": {"p50": "10ms", "p99": "20ms"},
            },
            "roles": {"control": True},
        }
    )
)


def series_of(expr: str) -> set[str]:
    return set(re.findall(r"\bvllm_suite_\w+", expr))


def in_table(series: str) -> bool:
    for name, (_, spec) in SPECS.items():
        ends = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
        if series in {name + end for end in ends}:
            return True
    return False


def test_expressions_ask_for_series_and_labels_of_the_table() -> None:
    asked = [expr for dashboard in DASHBOARDS for expr in expressions(dashboard)] + [one.expr for one in ALERTS]
    assert len(asked) > 80
    for expr in asked:
        for series in series_of(expr):
            assert in_table(series), series
        # A matcher with a value that the label never has finds nothing and says so to nobody.
        for series, matchers in re.findall(r"\b(vllm_suite_\w+)\{([^}]*)\}", expr):
            name = re.sub(r"_(bucket|sum|count)$", "", series)
            _, spec = SPECS.get(series) or SPECS[name]
            labels = {str(label): label for label in spec.labels}
            for label, operator, value in re.findall(r'(\w+)(=~|!=|=)"([^"]*)"', matchers):
                if label in ("fleet", "namespace"):
                    continue
                assert label in labels, (series, label)
                if labels[label].values and operator in ("=", "!="):
                    assert value in (*labels[label].values, "ROLE"), (series, label, value)


def test_dashboards_are_whole_and_apart() -> None:
    assert [one.name for one in DASHBOARDS] == ["overview", "disagg", "epd", "swiftkv", "dler", "roles", "planner"]
    for dashboard in DASHBOARDS:
        made = to_json(dashboard)
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in made["panels"]]
        assert len(set(places)) == len(places)
        assert len({p["title"] for p in made["panels"]}) == len(made["panels"])
        for panel in made["panels"]:
            for target in panel["targets"]:
                assert "FLEET" not in target["expr"]
                assert 'fleet=~"$fleet"' in target["expr"]


def test_the_charts_files_are_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chart", str(CHART), "--check"]) == 0, capsys.readouterr().err
    kept = {path.name for path in (CHART / "files/dashboards").iterdir()}
    assert kept == {f"{one.name}.json" for one in DASHBOARDS}
    copy = tmp_path / "chart"
    shutil.copytree(CHART, copy)
    name = next(iter(chart_files()))
    (copy / name).write_text("old")
    assert main(["chart", str(copy), "--check"]) == 1
    assert main(["chart", str(copy)]) == 0
    assert main(["chart", str(copy), "--check"]) == 0
    assert main(["chart", str(tmp_path)]) == 2


def test_the_command_prints_a_fleets_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("model: m\npools: {decode: {}}\n")
    assert main(["rules", str(path), "--selector", 'job="llm"']) == 0
    found = yaml.safe_load(capsys.readouterr().out)["groups"][0]["rules"]
    assert {one["alert"] for one in found} >= {"VllmSuitePoolBelowFloor", "VllmSuiteReferencesRefused"}
    assert not {one["alert"] for one in found} & {
        "VllmSuiteSloBurn",
        "VllmSuitePredictionLeft",
        "VllmSuiteItemsRefused",
    }
    assert all('job="llm"' in one["expr"] for one in found)
    path.write_text("pools: 3\n")
    assert main(["rules", str(path)]) == 2


R, KV = "vllm_suite_router", "vllm_suite_kv"
ON = 'instance="r"'
# Ten requests a minute with a time to first token below each bound.
QUICK = {
    f"{R}_requests_total{{{ON}}}": "0+60x370",
    f'{R}_slo_requests_total{{{ON},model="m",verdict="good"}}': "0+60x370",
    f'{R}_slo_requests_total{{{ON},model="m",verdict="late"}}': "0+1x370",
    f'{R}_instances{{{ON},role="encode",ready="true"}}': "1x370",
    f'{R}_instances{{{ON},role="prefill",ready="true"}}': "3x370",
    f'{R}_instances{{{ON},role="decode",ready="true"}}': "2x370",
    f"{R}_predicted_requests_per_second{{{ON}}}": "2x370",
    f'{R}_predicted_ttft_seconds{{{ON},share="0.5",bound="middle"}}': "0.1x370",
    f'{R}_predicted_ttft_seconds{{{ON},share="0.99",bound="middle"}}': "0.2x370",
    f'{R}_predicted_ttft_seconds{{{ON},share="0.99",bound="high"}}': "0.3x370",
    f'{R}_ttft_seconds_bucket{{{ON},model="m",le="0.1"}}': "0+55x370",
    f'{R}_ttft_seconds_bucket{{{ON},model="m",le="0.3"}}': "0+60x370",
    f'{R}_ttft_seconds_bucket{{{ON},model="m",le="1.0"}}': "0+60x370",
    f'{R}_ttft_seconds_bucket{{{ON},model="m",le="+Inf"}}': "0+60x370",
    f'{KV}_refused_total{{{ON},reason="stale_epoch"}}': "0x370",
    f'{KV}_recomputes_total{{{ON},reason="pull_timeout"}}': "0x370",
    f'{KV}_pulls_total{{{ON},outcome="ok"}}': "0+60x370",
    f'{KV}_pulls_total{{{ON},outcome="recomputed"}}': "0+1x370",
    f'vllm_suite_ec_refused_total{{{ON},reason="stale_epoch"}}': "0x370",
    f"vllm_suite_swiftkv_armed{{{ON}}}": "1x370",
    f"vllm_suite_roles_out{{{ON}}}": "0x370",
    f'vllm_suite_roles_looks_total{{{ON},outcome="ok"}}': "0+30x370",
}
# Alert -> what differs then, and labels besides the severity.
FAULTS: dict[str, tuple[dict[str, str | None], dict[str, str]]] = {
    "VllmSuitePoolBelowFloor": ({f'{R}_instances{{{ON},role="encode",ready="true"}}': None}, {"role": "encode"}),
    "VllmSuiteRouterErrors": ({f'{R}_requests_total{{{ON},code="502"}}': "0+2x370"}, {}),
    "VllmSuitePredictionLeft": ({f'{R}_ttft_seconds_bucket{{{ON},model="m",le="0.3"}}': "0+58x370"}, {}),
    "VllmSuiteRateAbovePlan": ({f"{R}_requests_total{{{ON}}}": "0+200x370"}, {}),
    "VllmSuiteReferencesRefused": (
        {f'{KV}_refused_total{{{ON},reason="stale_epoch"}}': "0x45 3x325"},
        {"reason": "stale_epoch"},
    ),
    "VllmSuiteTransferDeadlineMissed": (
        {f'{KV}_recomputes_total{{{ON},reason="pull_timeout"}}': "0x45 1x325"},
        {},
    ),
    "VllmSuiteTransfersFail": ({f'{KV}_pulls_total{{{ON},outcome="recomputed"}}': "0+3x370"}, {}),
    "VllmSuiteItemsRefused": (
        {f'vllm_suite_ec_refused_total{{{ON},reason="stale_epoch"}}': "0x45 3x325"},
        {"reason": "stale_epoch"},
    ),
    "VllmSuiteSkippingOff": ({f"vllm_suite_swiftkv_armed{{{ON}}}": "0x370"}, {}),
    "VllmSuiteInstanceOut": ({f"vllm_suite_roles_out{{{ON}}}": "1x370"}, {}),
    "VllmSuiteControllerAbsent": ({f'vllm_suite_roles_looks_total{{{ON},outcome="ok"}}': None}, {}),
}

# Values of looks by outcome, as the controller exports them from its start.
BLIND = {"ok": "x370", "partial": "+30x370"}


def case(name: str, changes: dict[str, str | None], firing: list[dict[str, str]], minutes: int = 50) -> dict[str, Any]:
    """A promtool test of the last of some minutes: the alerts that fire, and that no other does."""
    series = {**QUICK, **changes}
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items() if values is not None],
        "promql_expr_test": [
            {
                "expr": 'sum by (alertname, role, reason, window, severity) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minutes}m",
                "exp_samples": [
                    {"labels": "{" + ",".join(f'{k}="{v}"' for k, v in sorted(one.items())) + "}", "value": 1}
                    for one in firing
                ],
            }
        ],
    }


def severity(name: str) -> str:
    return next(one.severity for one in ALERTS if one.name == name)


def test_every_alert_fires_in_its_fault_and_no_other_does(tmp_path: Path) -> None:
    fast = {"alertname": "VllmSuiteSloBurn", "severity": "critical", "window": "1h"}
    slow = {"alertname": "VllmSuiteSloBurn", "severity": "warning", "window": "6h"}
    late = f'{R}_slo_requests_total{{{ON},model="m",verdict="late"}}'
    burns = [
        case("quiet for long", {}, [], 370),
        # A fifth of the requests for hours; two thirds for the last hour; and a bad time that is over.
        case("slow burn", {late: "0+20x370"}, [slow], 370),
        case("fast burn", {late: "0+0x300 0+200x70"}, [fast, slow], 370),
        case("burnt out", {late: "0+200x330 66000x40"}, [], 370),
    ]
    cases = [case("quiet", {}, [])]
    for name, (changes, labels) in FAULTS.items():
        cases.append(case(name, changes, [{"alertname": name, "severity": severity(name), **labels}]))
    # A controller that has never seen the whole fleet is no better than one that is away.
    blind = {f'vllm_suite_roles_looks_total{{{ON},outcome="{one}"}}': f"0{n}" for one, n in BLIND.items()}
    absent = {"alertname": "VllmSuiteControllerAbsent", "severity": severity("VllmSuiteControllerAbsent")}
    cases.append(case("a controller that is blind", blind, [absent]))
    assert {one.name for one in ALERTS} == set(FAULTS) | {"VllmSuiteSloBurn"}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule_file(FLEET)))
    for interval, tests in (("1m", cases), ("5m", burns)):
        path = tmp_path / f"every{interval}.yaml"
        path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": interval, "tests": tests}))
        promtool("test", "rules", str(path))


@pytest.mark.parametrize(
    ("attainment", "firing"),
    [
        # 16 and 30 of 100 are late.
        (0.99, {"1h": (16, 30), "6h": (16, 30)}),
        (0.95, {"1h": (30,), "6h": (16, 30)}),
        (0.9, {"6h": (30,)}),
        (0.8, {}),
    ],
)
def test_the_budget_is_that_of_the_fleet_file(
    tmp_path: Path, attainment: float, firing: dict[str, tuple[int, ...]]
) -> None:
    spec = FLEET.model_copy(update={"slo": FLEET.slo.model_copy(update={"attainment": attainment})})
    rules = rule_file(spec)
    burns = [one for one in rules["groups"][0]["rules"] if one["alert"] == "VllmSuiteSloBurn"]
    assert all(f"with {attainment} of them" in one["annotations"]["summary"] for one in burns)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "burns", "rules": burns}]}))
    good, late = (f'{R}_slo_requests_total{{{ON},model="m",verdict="{one}"}}' for one in ("good", "late"))
    words = {"1h": "critical", "6h": "warning"}
    tests = []
    for share in (16, 30):
        expected = [
            {"alertname": "VllmSuiteSloBurn", "severity": words[window], "window": window}
            for window, shares in firing.items()
            if share in shares
        ]
        tests.append(case(f"{share} late", {good: f"0+{100 - share}x370", late: f"0+{share}x370"}, expected, 370))
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "5m", "tests": tests}))
    promtool("test", "rules", str(path))


def test_a_wide_budget_still_has_an_end(tmp_path: Path) -> None:
    """With half of the requests to be good, twice the budget is all of them; three quarters late is too many."""
    spec = FLEET.model_copy(update={"slo": FLEET.slo.model_copy(update={"attainment": 0.5})})
    burns = [one for one in rule_file(spec)["groups"][0]["rules"] if one["alert"] == "VllmSuiteSloBurn"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "burns", "rules": burns}]}))
    good, late = (f'{R}_slo_requests_total{{{ON},model="m",verdict="{one}"}}' for one in ("good", "late"))
    both = [
        {"alertname": "VllmSuiteSloBurn", "severity": severity, "window": window}
        for severity, window in (("critical", "1h"), ("warning", "6h"))
    ]
    tests = [
        case("70 late", {good: "0+30x370", late: "0+70x370"}, [], 370),
        case("80 late", {good: "0+20x370", late: "0+80x370"}, both, 370),
    ]
    path = tmp_path / "tests.yaml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "5m", "tests": tests}))
    promtool("test", "rules", str(path))


def test_every_dashboard_expression_is_promql(tmp_path: Path) -> None:
    queries = [expr for one in DASHBOARDS for expr in expressions(one, 'fleet=~".*"', "1m")]
    rules = [{"record": f"suite:{index}", "expr": expr} for index, expr in enumerate(queries)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", "--lint=none", str(tmp_path / "rules.yaml"))


def test_goodput_without_a_good_request_is_0(tmp_path: Path) -> None:
    series = [{"series": f'{R}_slo_requests_total{{{ON},model="m",verdict="late"}}', "values": "0+60x20"}]
    expr = GOODPUT.queries[0].expr.replace("FLEET", 'fleet=~".*"').replace("$__rate_interval", "5m")
    wanted = {"expr": expr, "eval_time": "20m", "exp_samples": [{"labels": '{model="m"}', "value": 0}]}
    path = tmp_path / "tests.yaml"
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [wanted]}
    path.write_text(yaml.safe_dump({"tests": [test]}))
    promtool("test", "rules", str(path))


def test_json_is_what_the_chart_ships() -> None:
    shipped = json.loads((CHART / "files/dashboards/overview.json").read_text())
    assert shipped["uid"] == "vllm-suite-overview"


def test_the_page_names_every_alert_and_dashboard() -> None:
    page = (ROOT / "docs/observability.md").read_text()
    assert set(re.findall(r"^\| `(VllmSuite\w+)` \|", page, re.MULTILINE)) == {one.name for one in ALERTS}
    for dashboard in DASHBOARDS:
        assert f"`{dashboard.name}`" in page
