"""The page and the examples agree with the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_suite.fleet.files import dump_fleet, load_fleet, parse_fleet
from vllm_suite.fleet.reference import table

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_holds_the_table() -> None:
    written = (DOCS / "fleet.md").read_text().partition("<!-- reference -->\n")[2]
    assert written.strip() == table(), "run: python -m vllm_suite.fleet.reference"


@pytest.mark.parametrize("path", sorted((DOCS / "examples").glob("fleet-*.yaml")), ids=lambda path: path.stem)
def test_examples_are_fleets(path: Path) -> None:
    spec = load_fleet(path)
    assert parse_fleet(dump_fleet(spec)) == spec
