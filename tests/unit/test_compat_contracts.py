"""The contract table holds for the vLLM that is here, lists all that the suite uses, and can fail."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_suite.compat.contract_source import SourceTree
from vllm_suite.compat.contracts import Contract, check, installed_root, main, rows_for, table
from vllm_suite.compat.versions import SUPPORTED, installed_version, series

REPO = Path(__file__).resolve().parents[2]
ENV_SOURCE = "VLLM_SUITE_VLLM_SOURCE"  # folder with vllm/ and its dist-info: a wheel that was unpacked, not installed


def version_of(root: Path) -> str:
    [info] = [path for path in root.glob("vllm-*.dist-info") if "cpu" not in path.name]
    return series(info.name.removeprefix("vllm-").removesuffix(".dist-info"))


def test_the_installed_vllm_keeps_the_contract() -> None:
    root, version = installed_root(), installed_version()
    if root is None or version is None:
        pytest.skip("vLLM is not installed")
    assert check(root, rows_for(series(version))) == []


@pytest.mark.skipif(ENV_SOURCE not in os.environ, reason=f"{ENV_SOURCE} names no unpacked vLLM")
def test_another_source_tree_keeps_the_contract() -> None:
    root = Path(os.environ[ENV_SOURCE])
    assert check(root, rows_for(version_of(root))) == []


def test_each_row_is_well_formed() -> None:
    for row in table():
        assert row.versions, row
        assert set(row.versions) <= set(SUPPORTED), row
        assert row.why, row
        assert len(row.names) <= 2, row
        assert row.kind != "literal" or row.value is not None, row
        assert (row.kind in ("module", "literal")) == (not row.names), row


# -- completeness: every import of vLLM, and every inherited attribute, has a row


def sources() -> Iterator[Path]:
    yield from (REPO / "vllm_suite").rglob("*.py")
    yield from (REPO / "plugins").rglob("*.py")


def vllm_imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                yield node.module or "", alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield alias.name, None


def test_every_import_of_vllm_has_a_row() -> None:
    rows = table()
    modules = {row.module for row in rows}
    names = {(row.module, row.names[0]) for row in rows if row.names}
    missing = []
    for path in sources():
        for module, name in vllm_imports(ast.parse(path.read_text(encoding="utf-8"))):
            if (name is None and module not in modules) or (name is not None and (module, name) not in names):
                missing.append(f"{path.relative_to(REPO)}: {module}:{name}")
    assert not missing


def inherited_uses(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(base class, attribute) for what a class reads from ``self`` or ``super()`` and does not define itself."""
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef):
            continue
        attributes = [node for node in ast.walk(owner) if isinstance(node, ast.Attribute)]
        on_self = [n for n in attributes if isinstance(n.value, ast.Name) and n.value.id == "self"]
        own = {n.name for n in owner.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        own |= {n.target.id for n in owner.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        own |= {n.attr for n in on_self if isinstance(n.ctx, ast.Store)}
        used = {n.attr for n in on_self} - own
        for node in attributes:
            call = node.value
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "super":
                used.add(node.attr)
        for base in owner.bases:
            if isinstance(base, ast.Name):
                yield from ((base.id, name) for name in sorted(used))


def test_every_inherited_attribute_of_a_vllm_class_has_a_row() -> None:
    rows = [row for row in table() if row.names]
    members = {row.names for row in rows if len(row.names) == 2}
    # A base class may be named through its own base, where the attribute is defined.
    classes = {row.names[0] for row in rows if row.kind == "class"}
    missing = {
        f"{path.relative_to(REPO)}: {base}.{name}"
        for path in sources()
        for base, name in inherited_uses(ast.parse(path.read_text(encoding="utf-8")))
        if base in classes and (base, name) not in members and not any(m[1] == name for m in members)
    }
    assert not missing


# -- the walker sees what changed

MODULE = """
from pkg.base import Base, helper as assist
from .near import NEAR
GROUP = "pkg.plugins"
if True:
    GUARDED: int = 1
async def later(a, b=1, *rest, key, **more): ...
class Thing(Base):
    field: int
    limit = 3
    def __init__(self): self.made = 1
    def method(self, a, b): ...
    @classmethod
    def build(cls, a): ...
    @staticmethod
    def free(a): ...
    @property
    def shown(self): ...
"""
BASE = "class Base:\n    def inherited(self, x): self.deep: int = 2\ndef helper(x): ...\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text(MODULE)
    (package / "base.py").write_text(BASE)
    (package / "near.py").write_text("NEAR = 'near'\n")
    return tmp_path


HOLDS = [
    Contract("pkg", "module", "w"),
    Contract("pkg", "literal", "w", value="pkg.plugins"),
    Contract("pkg:GROUP", "attribute", "w", value="pkg.plugins"),
    Contract("pkg:GUARDED", "attribute", "w", value=1),
    Contract("pkg:NEAR", "attribute", "w", value="near"),
    Contract("pkg:assist", "function", "w", ("x",)),
    Contract("pkg:later", "function", "w", ("a", "b", "*rest", "key", "**more")),
    Contract("pkg:later", "function", "w", ("a", "key"), more=True),
    Contract("pkg:Thing", "class", "w"),
    Contract("pkg:Thing.field", "attribute", "w"),
    Contract("pkg:Thing.method", "method", "w", ("self", "a", "b")),
    Contract("pkg:Thing.inherited", "method", "w", ("self", "x")),
    Contract("pkg:Thing.build", "classmethod", "w", ("cls", "a")),
    Contract("pkg:Thing.free", "staticmethod", "w", ("a",)),
    Contract("pkg:Thing.shown", "property", "w"),
    Contract("pkg:Thing.made", "instance", "w"),
    Contract("pkg:Thing.deep", "instance", "w"),
]
BROKEN = [
    (Contract("pkg.gone", "module", "w"), "no such module"),
    (Contract("pkg:Gone", "class", "w"), "no such name"),
    (Contract("pkg:Gone.x", "method", "w"), "no class Gone"),
    (Contract("pkg:Thing.gone", "method", "w"), "has no member gone"),
    (Contract("pkg:Thing.limit", "instance", "w"), "no instance attribute limit"),
    (Contract("pkg", "literal", "w", value="pkg.other"), "no string"),
    (Contract("pkg:GROUP", "attribute", "w", value="x"), "not 'x'"),
    (Contract("pkg:Thing.method", "method", "w", ("self", "a")), "has parameters (self, a, b), not (self, a)"),
    (Contract("pkg:Thing.method", "method", "w", ("self", "b", "a"), more=True), "has parameters"),
    (Contract("pkg:Thing.inherited", "method", "w", ("self",)), "has parameters (self, x)"),
    (Contract("pkg:Thing.free", "method", "w"), "is a staticmethod, not a method"),
    (Contract("pkg:assist", "class", "w"), "is a function, not a class"),
]


@pytest.mark.parametrize("row", HOLDS, ids=lambda row: f"{row.path}-{row.kind}")
def test_what_holds(tree: Path, row: Contract) -> None:
    assert SourceTree(tree).problem(row) is None


@pytest.mark.parametrize(("row", "text"), BROKEN, ids=lambda part: part.path if isinstance(part, Contract) else "")
def test_what_does_not_hold(tree: Path, row: Contract, text: str) -> None:
    problem = SourceTree(tree).problem(row)
    assert problem is not None
    assert text in problem


def test_the_command_reports_and_fails(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "vllm").mkdir()
    assert main(["--source", str(tree), "--series", "0.33"]) == 1
    assert "no such module" in capsys.readouterr().out
    assert main(["--source", str(tree / "pkg")]) == 2
