"""What the pages say exists: commands and their flags, files, keys of settings, series, links."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from vllm_suite.cli.main import VERBS, build_parser
from vllm_suite.cli.subverbs import Subverbs
from vllm_suite.fleet.files import parse_fleet
from vllm_suite.fleet.kubernetes import KubernetesSpec
from vllm_suite.fleet.spec import FleetSpec
from vllm_suite.metrics import GROUPS
from vllm_suite.router.config import RouterConfig

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
SERIES = {spec.name: spec for group in GROUPS for spec in group.specs}


def blocks(text: str, *kinds: str) -> Iterator[str]:
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if kind in kinds:
            yield block


def spans(text: str) -> list[str]:
    """Code in running text."""
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", plain)]


def lines(text: str) -> list[str]:
    """Commands, each on one line; those of running text begin with a space, since they need not be whole."""
    found = [
        line.strip() for block in blocks(text, "bash", "") for line in block.replace("\\\n", " ").splitlines() if line
    ]
    return found + [f" {span}" for span in spans(text)]


def commands(start: str) -> list[Any]:
    return [
        pytest.param(line, id=f"{page}: {line[:60]}")
        for page, text in PAGES.items()
        for line in dict.fromkeys(lines(text))
        if re.match(rf" ?{start}(\s[^0-9]|$)", line)
    ]


def expanded(path: str) -> list[str]:
    """`a{b,c}` as a shell takes it."""
    found = re.fullmatch(r"([^{]*)\{([^}]*)\}(.*)", path)
    return [f"{found[1]}{one}{found[3]}" for one in found[2].split(",")] if found else [path]


def words_of(line: str) -> list[str]:
    """Without comments, pipes and redirections; `[--flag]` as if it were given."""
    words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
    return list(itertools.takewhile(lambda word: word not in ("|", ">", "&&", ";"), words))


def known_flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    """That of the verb, or of its verb, and what is left for it."""
    assert words[0] in VERBS, f"no verb {words[0]}"
    module = importlib.import_module(f"vllm_suite.cli.{words[0].replace('-', '_')}")
    inner: Subverbs | None = getattr(module, "_SUBVERBS", None)
    if inner is not None and len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in inner.verbs, f"no verb {words[:2]}"
        parser = argparse.ArgumentParser()
        importlib.import_module(inner.verbs[words[1]][0]).add_arguments(parser)
        return parser, words[2:]
    parser = build_parser((words[0],))._subparsers._group_actions[0].choices[words[0]]  # type: ignore[union-attr,index,assignment]
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if actions and len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in actions[0].choices, f"no verb {words[:2]}"
        return actions[0].choices[words[1]], words[2:]
    return parser, words[1:]


@pytest.mark.parametrize("line", commands("vllm-suite"))
def test_commands_of_the_suite(line: str) -> None:
    words = words_of(line)[1:]
    if not words or words[0].isupper():
        return
    parser, rest = parser_of(words)
    given = {word.split("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    assert given <= known_flags(parser), line
    if line[0] != " " and "..." not in line and "--help" not in line and not re.search(r"\b[A-Z]+\b", " ".join(rest)):
        parser.parse_args(rest)


@pytest.mark.parametrize("line", commands("python") + commands("pytest"))
def test_other_commands_name_what_is_there(line: str) -> None:
    words = words_of(line)
    assert words[0] in ("python", "pytest")
    if words[:3] == ["python", "-m", "pytest"] or words[0] == "pytest":
        paths = [path for word in words if word.startswith("tests/") for path in expanded(word.split("::")[0])]
        assert paths, line
        missing = [path for path in paths if not list(ROOT.glob(path))]
        assert not missing, line
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None, line
    elif words[1].endswith(".py"):
        path = ROOT / words[1]
        source = path.read_text() + (ROOT / "benchmarks/common.py").read_text()
        for flag in {word.split("=")[0] for word in words[2:] if word.startswith("--")}:
            assert f'"{flag}"' in source, f"{line}: {flag}"


@pytest.mark.parametrize("line", commands("make"))
def test_targets_of_make(line: str) -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [word for word in words_of(line)[1:] if "=" not in word and word.islower()]
    assert set(wanted) <= set(targets), line


def _fleets() -> list[Any]:
    keys = set(FleetSpec.model_fields)
    found = []
    for page, text in PAGES.items():
        for number, block in enumerate(blocks(text, "yaml")):
            data = yaml.safe_load(block)
            if isinstance(data, dict) and data and set(data) <= keys and set(data) - {"model"}:
                found.append(pytest.param(data, id=f"{page} {number}"))
    return found


@pytest.mark.parametrize("data", _fleets())
def test_parts_of_fleet_files_are_accepted(data: dict[str, Any]) -> None:
    base = {"model": "org/model", "plugins": ["disagg", "epd"], "pools": {"decode": {}, "any": {"replicas": 8}}}
    parse_fleet(yaml.safe_dump({**base, **data}))


def _inner(model: type[BaseModel], key: str) -> list[Any]:
    """The annotations behind a key, `None` and containers taken apart."""
    if key not in model.model_fields:
        return []
    stack, found = [model.model_fields[key].annotation], []
    while stack:
        one = stack.pop()
        found.append(one)
        stack += getattr(one, "__args__", ())
    return found


def _leads(model: type[BaseModel], path: list[str]) -> bool:
    inner = _inner(model, path[0])
    if not inner:
        return False
    models = [one for one in inner if isinstance(one, type) and issubclass(one, BaseModel)]
    if len(path) == 1 or not models:
        return True
    return any(_leads(one, path[1:]) for one in models) or path[1] == "ROLE"


def _keys() -> list[Any]:
    """Dotted names in the text whose first part is a section of the settings."""
    sections = {
        name
        for model in (FleetSpec, RouterConfig, KubernetesSpec)
        for name in model.model_fields
        if any(isinstance(one, type) and issubclass(one, BaseModel) for one in _inner(model, name))
    }
    return [
        pytest.param(name, id=f"{page}: {name}")
        for page, text in PAGES.items()
        for name in dict.fromkeys(spans(text))
        if re.fullmatch(r"[a-z_]+(\.[a-z_A-Z]+)+", name) and name.split(".")[0] in sections
        if not name.endswith((".py", ".json", ".yaml", ".md"))
    ]


@pytest.mark.parametrize("name", _keys())
def test_keys_of_settings(name: str) -> None:
    roots = (FleetSpec, RouterConfig, KubernetesSpec)
    assert any(_leads(root, name.replace("ROLE", "decode").split(".")) for root in roots), name


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if "vllm_suite_" in text])
def test_series(page: str) -> None:
    text = PAGES[page].replace("vllm_suite_control", "")  # the name of an endpoint plugin
    for name, star in re.findall(r"\b(vllm_suite_\w*[a-z])(_?\*|_(?=`))?", text):
        if star:
            assert any(known.startswith(name) for known in SERIES), name
        else:
            plain = re.sub(r"_(bucket|sum|count)$", "", name)
            assert name in SERIES or (plain in SERIES and SERIES[plain].kind == "histogram"), name


@pytest.mark.parametrize("page", ["docs/operations.md", "docs/security.md", "docs/kubernetes.md", "docs/roles.md"])
def test_short_names_of_series(page: str) -> None:
    for span in spans(PAGES[page]):
        found = re.match(r"([a-z]\w*_total)\b", span)
        if found and not found[1].startswith("vllm"):
            assert any(known.endswith(f"_{found[1]}") for known in SERIES), span
        for label, value in re.findall(r'(\w+)="(\w+)"', span if found else ""):
            specs = [spec for known, spec in SERIES.items() if known.endswith(found[1])]  # type: ignore[index]
            values = {each for spec in specs for one in spec.labels if one == label for each in one.values}
            assert not values or value in values, span


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    folder = (ROOT / page).parent
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[page]):
        if "://" in target:
            continue
        file = folder / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"
