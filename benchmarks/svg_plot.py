"""A line chart as an SVG file, without any plotting library: one panel per quantity, one line per kind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 380, 240, 62, 34, 44, 20
# Colours that stay apart for most kinds of colour blindness, and a dash of its own for each line.
_COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00")
_DASHES = ("", "6 3", "2 2", "8 2 2 2", "4 4", "1 3")


@dataclass(frozen=True)
class Panel:
    """One chart: `lines` maps a kind to its values, one for each of `x`; None leaves a point out."""

    title: str
    x_title: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]


def write_svg(path: Path, panels: Sequence[Panel], caption: str) -> None:
    """Write the panels side by side. Every axis begins at zero. Raises ValueError where there is nothing to draw."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    if not names:
        raise ValueError("nothing to draw")
    width = len(panels) * (_WIDTH + _LEFT + _GAP)
    height = _TOP + _HEIGHT + _BOTTOM + 18 * len(names) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>'
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, names, index * (_WIDTH + _LEFT + _GAP) + _LEFT)
    below = _TOP + _HEIGHT + _BOTTOM + 8
    for index, name in enumerate(names):
        y = below + 18 * index
        parts.append(f'<path d="M{_LEFT} {y}h34" {_stroke(index)}/>')
        parts.append(f'<text x="{_LEFT + 42}" y="{y + 4}">{escape(name)}</text>')
    parts.append(f'<text x="{_LEFT}" y="{height - 8}" fill="#555">{escape(caption)}</text></svg>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


def steps(highest: float) -> list[float]:
    """Marks of an axis from 0 to the first one that is not below `highest`: four to ten, at 1, 2 or 5."""
    if highest <= 0 or not math.isfinite(highest):
        return [0.0, 1.0]
    raw = highest / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(i * step, 12) for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _panel(panel: Panel, names: Sequence[str], left: float) -> list[str]:
    values = [value for line in panel.lines.values() for value in line if value is not None]
    marks = steps(max(values, default=0.0))
    across = steps(max(panel.x))
    bottom = _TOP + _HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x / across[-1] * _WIDTH, bottom - y / marks[-1] * _HEIGHT

    parts = [f'<text x="{left}" y="{_TOP - 14}" font-weight="bold">{escape(panel.title)}</text>']
    for mark in marks:
        _, y = at(0, mark)
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for value in panel.x:
        x, _ = at(value, 0)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="black"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<path d="M{left} {_TOP}V{bottom}h{_WIDTH}" fill="none" stroke="black"/>')
    middle = left + _WIDTH / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">{escape(panel.x_title)}</text>')
    for name, line in panel.lines.items():
        points = [at(x, y) for x, y in zip(panel.x, line, strict=True) if y is not None]
        index = names.index(name)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" {_stroke(index)}/>')
        colour = _COLOURS[index % len(_COLOURS)]
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return parts


def _stroke(index: int) -> str:
    dash = _DASHES[index % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'fill="none" stroke="{_COLOURS[index % len(_COLOURS)]}" stroke-width="2"{dashes}'
