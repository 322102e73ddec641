"""What the chart makes of three fleets, written out: a change of a template shows as a change of these files.

    python tests/unit/chart/test_chart_golden.py      # writes them anew

Monitors, rules and dashboards have tests of their own and are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chart_render import CASES, files

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("encoders", "large", "switching")
TEMPLATES = ("access", "autoscaling", "controller", "gateway", "instances", "network", "router", "tests/request")
_DRAWN = re.compile(r"^(  (?:upstream|control|fleet)-key: )\S+$", re.MULTILINE)
_BLANKS = re.compile(r" +$", re.MULTILINE)


def rendered(name: str, kube: str = "v1.34.0") -> str:
    """All objects of a case; keys that are drawn are blanked."""
    found = files(CASES[name], kube)
    texts = {template: found.get(f"vllm-suite/templates/{template}.yaml", "").strip() for template in TEMPLATES}
    kept = [f"# {template}.yaml\n{text}\n" for template, text in texts.items() if text]
    return _DRAWN.sub(r"\1(drawn)", _BLANKS.sub("", "".join(kept)))


@pytest.mark.parametrize("kube", ["v1.29.0", "v1.34.0", "v1.37.0"])
@pytest.mark.parametrize("name", NAMES)
def test_objects_are_as_written_down(name: str, kube: str) -> None:
    written = (GOLDEN / f"{name}.yaml").read_text()
    assert rendered(name, kube) == written, "if that is meant: python tests/unit/chart/test_chart_golden.py"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for one in NAMES:
        (GOLDEN / f"{one}.yaml").write_text(rendered(one))
