"""Three plans as `vllm-suite plan` writes them: what the chart gets from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from chart_render import PLANS

from vllm_suite.cli.main import main


@pytest.fixture(scope="session")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fleet file of each of `PLANS`."""
    folder = tmp_path_factory.mktemp("plans")
    found: dict[str, Path] = {}
    for name, words in PLANS.items():
        found[name] = folder / f"{name.replace(' ', '-')}.yaml"
        assert main(["plan", *words, "--processes", "1", "-o", str(found[name])]) == 0, name
    return found
