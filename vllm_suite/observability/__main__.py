"""Write what the chart ships of dashboards and alerts, or print the rule file of a fleet.

::

    python -m vllm_suite.observability chart charts/vllm-suite [--check]
    python -m vllm_suite.observability rules fleet.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from vllm_suite.fleet.slo import SloSpec
from vllm_suite.observability.alerts import ALERTS
from vllm_suite.observability.dashboards import DASHBOARDS
from vllm_suite.observability.grafana import to_json


def chart_files() -> dict[str, str]:
    """Files by path inside the chart."""
    alerts = [{"when": one.when, "each": one.each, "rule": one.rule()} for one in ALERTS]
    table = {"attainment": SloSpec().attainment, "alerts": alerts}  # where the values say nothing of `slo`
    files = {"files/alerts.yaml": yaml.safe_dump(table, sort_keys=False, width=120)}
    for dashboard in DASHBOARDS:
        files[f"files/dashboards/{dashboard.name}.json"] = json.dumps(to_json(dashboard), indent=1) + "\n"
    return files


def main(argv: list[str] | None = None) -> int:
    """0: written, printed, or current with --check; 1: not current; 2: no such chart or fleet."""
    parser = argparse.ArgumentParser(prog="python -m vllm_suite.observability", description="dashboards and alerts")
    verbs = parser.add_subparsers(dest="verb", required=True)
    chart = verbs.add_parser("chart", help="write the chart's files")
    chart.add_argument("chart", type=Path)
    chart.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file is not current")
    rules = verbs.add_parser("rules", help="print a rule file for Prometheus")
    rules.add_argument("fleet", type=Path)
    rules.add_argument("--selector", default="", help="""label matchers of this fleet, for example 'job="llm"'""")
    args = parser.parse_args(argv)
    return _chart(args.chart, check=args.check) if args.verb == "chart" else _rules(args.fleet, args.selector)


def _chart(folder: Path, *, check: bool) -> int:
    if not (folder / "Chart.yaml").is_file():
        print(f"{folder} is no chart: it has no Chart.yaml", file=sys.stderr)
        return 2
    stale = False
    for name, text in chart_files().items():
        path = folder / name
        if check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{path} is not current; run: python -m vllm_suite.observability chart {folder}", file=sys.stderr)
                stale = True
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return int(stale)


def _rules(path: Path, selector: str) -> int:
    from vllm_suite.fleet.files import FleetFileError, load_fleet
    from vllm_suite.observability.rules import rule_file

    try:
        spec = load_fleet(path)
    except FleetFileError as error:
        print(error, file=sys.stderr)
        return 2
    print(yaml.safe_dump(rule_file(spec, selector), sort_keys=False, width=120), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
