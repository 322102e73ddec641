"""docs/length-aware-scheduling.md says what the code says, and `doctor` too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from vllm_dler.config import WHERE, SchedulerSettings
from vllm_dler.report import parts
from vllm_suite.catalog import SelectionError
from vllm_suite.metrics import SCHED

PAGE = (Path(__file__).parents[3] / "docs" / "length-aware-scheduling.md").read_text()


def rows(model: type[BaseModel] = SchedulerSettings, prefix: str = "") -> Iterator[str]:
    """The settings as Markdown rows."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if name == "lengths":
            yield f"| `{name}` | | `vllm_suite.lengths.LengthSettings`: how much is remembered, and for how long |"
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from rows(kind, f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | `{json.dumps(field.default)}` | {field.description} |"


def section(name: str) -> list[str]:
    written = PAGE.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
    return written.strip().splitlines()[2:]


def test_every_setting_is_on_the_page() -> None:
    assert section("settings") == list(rows()), "\n".join(rows())


def test_every_series_is_on_the_page() -> None:
    wanted = [
        f"| `{spec.name}`{' by ' + ', '.join(spec.labels) if spec.labels else ''} | {spec.kind} | {spec.help} |"
        for spec in SCHED
    ]
    assert section("series") == wanted, "\n".join(wanted)


def test_doctor_shows_every_setting() -> None:
    shown = parts(SchedulerSettings())
    text = "\n".join(shown.values())
    for name in SchedulerSettings.model_fields:
        assert name in shown or f"{name}=" in text, name
    assert shown["settings"].startswith(f"{WHERE}: rule=boost, kappa=0.02, ")
    assert shown["gate"].startswith("off: usage=")
    assert shown["victims"].startswith("on: max_evictions=3")
    assert "kappa=0.5" in parts(SchedulerSettings(kappa=0.5))["settings"]


class Args:
    def __init__(self, dler: Any) -> None:
        self.additional_config = {"suite": {"dler": dler}}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kapa": 1}, "additional_config.suite.dler.kapa: Extra inputs are not permitted"),
        ({"kappa": -1}, "additional_config.suite.dler.kappa: Input should be greater than or equal to 0"),
        ({"kappa": "1"}, "additional_config.suite.dler.kappa: Input should be a valid number"),
        ({"victims": {"growth": 0.5}}, "additional_config.suite.dler.victims.growth: "),
        ({"caps": {"chat": 0}}, "caps.chat must be at least 1, not 0"),
        (
            {"rule": "kappa", "adaptive": {"enabled": True}, "kappa": 0},
            "kappa 0 is not between",
        ),
        ({"adaptive": {"enabled": True}}, 'adaptive is for rule "kappa"'),
        ({"rule": "sjf"}, "additional_config.suite.dler.rule: Input should be 'boost' or 'kappa'"),
        ({"adaptive": {"minimum": 1.0, "maximum": 0.5}}, "minimum 1 is above maximum 0.5"),
        ({"lengths": {"min_observation": 1}}, "additional_config.suite.dler.lengths.min_observation: Extra"),
        (3, "additional_config.suite.dler must be an object of settings, not 3"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(given: Any, text: str) -> None:
    with pytest.raises(SelectionError) as caught:
        SchedulerSettings.of(Args(given))
    assert text in str(caught.value)


def test_settings_that_are_right() -> None:
    given = {"kappa": 1, "caps": {"*": 4000}, "victims": {"enabled": False}, "lengths": {"min_observations": 4}}
    settings = SchedulerSettings.of(Args(given))
    assert (settings.kappa, settings.caps, settings.lengths.min_observations) == (1.0, {"*": 4000}, 4)
    assert settings.reorders
    assert not SchedulerSettings.of(Args({"rule": "kappa", "kappa": 0})).reorders
    assert not SchedulerSettings.of(Args({"boost": {"strength": 0}})).reorders
    assert SchedulerSettings.of(Args({})) == SchedulerSettings()
