"""The pages on operations and security name series, routes and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_suite.metrics import GROUPS

ROOT = Path(__file__).parents[3]
PAGES = ("operations.md", "security.md")
KNOWN = {spec.name for group in GROUPS for spec in group.specs}


@pytest.mark.parametrize("page", PAGES)
def test_series_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    found = set(re.findall(r"`(vllm_suite_\w*[a-z]|\w+_total)[`{]", text))
    wanted = {name if name.startswith("vllm_suite_") else f"vllm_suite_router_{name}" for name in found}
    assert wanted
    assert wanted <= KNOWN


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        file = ROOT / "docs" / (target or page)
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"
