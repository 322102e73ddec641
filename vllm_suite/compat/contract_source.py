"""Read names, signatures and values out of a Python source tree without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vllm_suite.compat.contracts import Contract

_MAX_HOPS = 8  # re-exports followed from module to module
_Function = ast.FunctionDef | ast.AsyncFunctionDef


class SourceTree:
    """A folder of packages. Parsed files are kept, so checking many rows reads each file once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parse = cache(self._read)

    def problem(self, row: Contract) -> str | None:
        """Why ``row`` does not hold here, or None where it does."""
        tree = self._parse(row.module)
        if tree is None:
            return "no such module"
        if row.kind == "module":
            return None
        if row.kind == "literal":
            found = any(isinstance(n, ast.Constant) and n.value == row.value for n in ast.walk(tree))
            return None if found else f"no string {row.value!r} in it"
        if len(row.names) == 1:
            home = self._follow(row.module, row.names[0])
            return "no such name" if home is None else _compare(row, home[1])
        return self._member(row)

    def signature(self, module: str, *names: str) -> tuple[str, ...] | None:
        """Parameters of a function or method, as `Contract.params` writes them; None where there is none."""
        home = self._follow(module, names[0])
        node = home[1] if home is not None else None
        if home is not None and len(names) == 2 and isinstance(node, ast.ClassDef):
            node = next((found for found, _ in self._lookup(home[0], node, names[1])), None)
        return _params(node) if isinstance(node, _Function) else None

    def _member(self, row: Contract) -> str | None:
        owner, member = row.names
        home = self._follow(row.module, owner)
        if home is None or not isinstance(home[1], ast.ClassDef):
            return f"no class {owner}"
        found = [
            node for node, on_self in self._lookup(home[0], home[1], member) if on_self == (row.kind == "instance")
        ]
        if not found:
            return f"{owner} has no {'instance attribute' if row.kind == 'instance' else 'member'} {member}"
        return None if row.kind == "instance" else _compare(row, found[0])

    def _read(self, module: str) -> ast.Module | None:
        base = self._root.joinpath(*module.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8"))
        return None

    def _follow(self, module: str, name: str, hops: int = _MAX_HOPS) -> tuple[str, ast.stmt] | None:
        """The module and statement that define ``name``, through imports."""
        tree = self._parse(module)
        if tree is None or hops == 0:
            return None
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._follow(self._absolute(module, node), alias.name, hops - 1)
            elif name in _defined(node):
                return module, node
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self._root.joinpath(*module.split("."), "__init__.py").is_file()
        parts = module.split(".")[: None if is_package and node.level == 1 else -(node.level - is_package)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def _lookup(self, module: str, owner: ast.ClassDef, name: str) -> Iterator[tuple[ast.stmt, bool]]:
        """Definitions of ``name`` in a class and its bases, nearest first; True for assignments to ``self``."""
        for node in _statements(owner.body):
            if name in _defined(node):
                yield node, False
            if isinstance(node, _Function):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Assign | ast.AnnAssign) and name in _on_self(inner):
                        yield inner, True
        for base in owner.bases:
            target = base.value if isinstance(base, ast.Subscript) else base
            home = self._follow(module, target.id) if isinstance(target, ast.Name) else None
            if home is not None and isinstance(home[1], ast.ClassDef):
                yield from self._lookup(home[0], home[1], name)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or class body, those inside ``if``, ``try`` and ``with`` too."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, []))


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _on_self(node: ast.Assign | ast.AnnAssign) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    flat = [item for t in targets for item in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return {
        t.attr for t in flat if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name) and t.value.id == "self"
    }


def _kind_of(node: ast.stmt) -> str:
    if isinstance(node, ast.ClassDef):
        return "class"
    if not isinstance(node, _Function):
        return "attribute"
    for decorator in node.decorator_list:
        name = decorator.id if isinstance(decorator, ast.Name) else getattr(decorator, "attr", "")
        if name in ("property", "cached_property"):
            return "property"
        if name in ("classmethod", "staticmethod"):
            return name
    return "function"


def _compare(row: Contract, node: ast.stmt) -> str | None:
    found = _kind_of(node)
    wanted = "function" if row.kind == "method" else row.kind
    if found != wanted:
        return f"is a {found}, not a {row.kind}"
    if row.value is not None:
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        actual = value.value if isinstance(value, ast.Constant) else None
        if actual != row.value:
            return f"is {actual!r}, not {row.value!r}"
    if row.params is not None and isinstance(node, _Function):
        return compare_params(row, _params(node))
    return None


def compare_params(row: Contract, found: tuple[str, ...]) -> str | None:
    """Why parameters ``found`` are not those of the row, or None."""
    assert row.params is not None
    rest = iter(found)
    kept_order = all(name in rest for name in row.params)
    if found == row.params or (row.more and kept_order):
        return None
    return f"has parameters ({', '.join(found)}), not ({', '.join(row.params)}{', ...' if row.more else ''})"


def _params(node: _Function) -> tuple[str, ...]:
    a = node.args
    names = [arg.arg for arg in (*a.posonlyargs, *a.args)]
    names += [f"*{a.vararg.arg}"] if a.vararg else []
    names += [arg.arg for arg in a.kwonlyargs]
    names += [f"**{a.kwarg.arg}"] if a.kwarg else []
    return tuple(names)
