"""The tables of docs/metrics.md."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_suite.metrics import GROUPS
from vllm_suite.metrics.table import Group, Label, SeriesSpec

MARK = "<!-- written by python -m vllm_suite.metrics: do not edit below -->\n"

_LONG = 10


def tables() -> str:
    """Markdown: one table for each group."""
    return "\n".join(line for group in GROUPS for line in _table(group)).rstrip() + "\n"


def _table(group: Group) -> Iterator[str]:
    yield f"## {group.title}"
    yield ""
    common = ", ".join(f"`{label}` ({label.bound})" for label in group.common)
    yield group.where + (f" Labels of all of them: {common}." if common else "")
    yield ""
    yield "| series | type | unit | labels | what it says |"
    yield "|---|---|---|---|---|"
    seen: dict[tuple[str, ...], str] = {}
    for spec in group.specs:
        labels = "<br>".join(_label(label, spec, seen) for label in spec.labels)
        yield f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {_help(spec)} |"
    yield ""


def _label(label: Label, spec: SeriesSpec, seen: dict[tuple[str, ...], str]) -> str:
    """Long sets stand once in a table, with the first series that has them."""
    values = label.values
    if len(values) < _LONG:
        return f"`{label}`: " + (", ".join(values) if values else label.bound)
    first = seen.setdefault(values, f"`{label}` of `{spec.name}`")
    return f"`{label}`: " + (", ".join(values) if first.endswith(f"`{spec.name}`") else f"as {first}")


def _help(spec: SeriesSpec) -> str:
    text = spec.help.replace("|", "\\|")
    if not spec.buckets:
        return text
    return f"{text} {len(spec.buckets)} buckets, {spec.buckets[0]:g} to {spec.buckets[-1]:g}."
