"""Every command of the planner's pages has arguments that go together, and a model and hardware that are known."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from vllm_suite.cli.plan import add_arguments
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.report.arguments import check
from vllm_suite.planner.search.choices import Choices

DOCS = Path(__file__).parents[3] / "docs"
PAGES = [DOCS / "planner.md", *sorted((DOCS / "planner").glob("*.md"))]
COMMANDS = [
    (page.name, line)
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("vllm-suite plan ") and "..." not in line
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_documented_command_is_accepted(page: str, line: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(shlex.split(line, comments=True)[2:])
    check(args)
    _, stored = load(args.model)
    cluster(args.gpus)
    Choices.parse(args.space, stored)
