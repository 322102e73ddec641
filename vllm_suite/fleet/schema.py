"""`vllm-suite fleet schema`: the JSON schema and the default values of the Helm chart, from `FleetSpec`.

The schema is what pydantic knows field by field; what it checks across fields the chart checks in its templates.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from vllm_suite import catalog
from vllm_suite.fleet.engine import EngineSpec
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.kube.verbs import chart_rights

_HEAD = """\
# Written by `vllm-suite fleet schema charts/vllm-suite`. A fleet file is the values file:
#   helm install llm charts/vllm-suite -f fleet.yaml
# Keys outside `kubernetes` are those of docs/fleet.md; they have the defaults of vllm-suite itself.
"""


def chart_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a values file; unknown keys are refused, as `load_fleet` does."""
    schema = FleetSpec.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["properties"]["plugins"]["items"] = {"enum": list(catalog.landed_names()), "type": "string"}
    # Helm hands it to every chart that is a dependency of another one.
    schema["properties"]["global"] = {"type": "object"}
    return schema


def chart_values() -> dict[str, Any]:
    """The chart's values.yaml: the defaults of `kubernetes` and of `plugins`.

    Engine flags have none, as without the chart. None is left out: Helm takes a null for "remove this key".
    """
    spec = KubernetesSpec().model_dump(mode="json", exclude_none=True)
    plugins = FleetSpec.model_fields["plugins"].default
    return {"plugins": list(plugins), "kubernetes": spec}


def engine_fields() -> list[str]:
    """Keys of `engine` in the order in which they become flags; `args` comes last."""
    return [name for name in EngineSpec.model_fields if name != "args"]


def chart_files() -> dict[str, str]:
    """What the command writes, by path inside the chart."""
    values = yaml.safe_dump(chart_values(), sort_keys=False)
    return {
        "values.schema.json": json.dumps(chart_schema(), indent=1) + "\n",
        "values.yaml": _HEAD + values,
        "files/engine-fields.yaml": yaml.safe_dump(engine_fields()),
        "files/rbac.yaml": yaml.safe_dump(chart_rights(), sort_keys=False),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("chart", nargs="?", type=Path, help="chart folder to write into; prints the schema without it")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where a file is not current")


def run(args: argparse.Namespace) -> int:
    """0: printed, written, or current with --check."""
    if args.chart is None:
        print(chart_files()["values.schema.json"], end="")
        return 0
    if not (args.chart / "Chart.yaml").is_file():
        print(f"vllm-suite fleet schema: {args.chart} is no chart: it has no Chart.yaml", file=sys.stderr)
        return 2
    stale = False
    for name, text in chart_files().items():
        path = args.chart / name
        if args.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                print(f"{path} is not current; run: vllm-suite fleet schema {args.chart}", file=sys.stderr)
                stale = True
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 1 if stale else 0
