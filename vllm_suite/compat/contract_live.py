"""The same rows, checked on the imported vLLM: what decorators and metaclasses made of the source."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable

from vllm_suite.compat.contract_source import compare_params
from vllm_suite.compat.contracts import Contract

_STARS: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def check_live(rows: Iterable[Contract]) -> list[str]:
    """One line per row that does not hold. Imports vLLM, which takes seconds.

    Rows of kind ``instance`` and ``literal`` show in the source only and are passed over, and so are fields
    without a default, which a class does not have as an attribute.
    """
    return [f"{row.path}: {problem}" for row in rows if (problem := _problem(row)) is not None]


def _problem(row: Contract) -> str | None:
    try:
        owner: object = importlib.import_module(row.module)
    except ImportError as error:
        return f"cannot be imported: {error}"
    if row.kind in ("module", "instance", "literal"):
        return None
    for name in row.names[:-1]:
        owner = getattr(owner, name, None)
        if owner is None:
            return f"no {name}"
    last = row.names[-1]
    fields = getattr(owner, "__annotations__", {})
    if not hasattr(owner, last):
        return None if row.kind == "attribute" and last in fields else "no such name"
    found = getattr(owner, last)
    if row.value is not None and found != row.value:
        return f"is {found!r}, not {row.value!r}"
    if row.kind == "class" and not inspect.isclass(found):
        return "is not a class"
    if row.params is None:
        return None
    raw = inspect.getattr_static(owner, last)
    function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
    names = tuple(_STARS.get(p.kind, "") + p.name for p in inspect.signature(function).parameters.values())
    return compare_params(row, names)
