"""Pictures of a plan, drawn with matplotlib: PNG or SVG files, or SVG text for a page that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_suite.planner.outcome import Collector
from vllm_suite.planner.plan import Slo
from vllm_suite.planner.report.series import PoolSeries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#c98b1f", "#5c6b73")
_STYLE: dict[Any, Any] = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.color": "#e3e3e3", "axes.axisbelow": True, "svg.fonttype": "none", "svg.hashsalt": "planner",
          "legend.frameon": False}  # fmt: skip


class PictureError(RuntimeError):
    """matplotlib is missing, or a file of that kind is not drawn."""


@dataclass(frozen=True)
class Mark:
    """A plan in the plane of two objectives; `front`: no other one is better in both."""

    name: str
    x: float
    y: float
    front: bool = False


@dataclass(frozen=True)
class Step:
    """Attainment at a rate, with its interval."""

    rate: float
    attainment: float
    low: float
    high: float


def _figure(width: float = 6.4, height: float = 3.8, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise PictureError("pictures need matplotlib: pip install 'vllm-suite[pictures]'") from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [each for row in axes for each in row]


def pareto(marks: Sequence[Mark], x: str, y: str) -> Figure:
    """Plans by two objectives, those of the front named. Nothing is joined: a third objective may have put one there.

    Args:
        x, y: what they are, with the unit; more of `x` is better, less of `y`.
    """
    figure, (axes,) = _figure()
    others, front = [mark for mark in marks if not mark.front], sorted(
        (mark for mark in marks if mark.front), key=lambda mark: mark.x
    )  # fmt: skip
    if others:
        axes.scatter([mark.x for mark in others], [mark.y for mark in others], s=14, color="#b5b5b5", label="others")
    places = [mark.x for mark in front], [mark.y for mark in front]
    axes.plot(*places, "o", color=_COLOURS[0], ms=5, label="no plan beats these")
    middle = (min(mark.x for mark in marks) + max(mark.x for mark in marks)) / 2 if marks else 0.0
    for mark in front:
        # Names stay inside: those of the right half end at their mark.
        right = mark.x > middle
        axes.annotate(mark.name, (mark.x, mark.y), xytext=(-6 if right else 6, 6), textcoords="offset points",
                      fontsize=7, ha="right" if right else "left")  # fmt: skip
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(0.12)
    _below(figure, axes)
    return figure


def attainment(curves: Mapping[str, Sequence[Step]], share: float) -> Figure:
    """Share of requests within both targets over the rate, with 95 % intervals; `share`: the one that is asked for."""
    figure, (axes,) = _figure()
    for (name, steps), colour in zip(curves.items(), _COLOURS, strict=False):
        ordered = sorted(steps, key=lambda step: step.rate)
        rates = [step.rate for step in ordered]
        low, high = [step.low for step in ordered], [step.high for step in ordered]
        axes.fill_between(rates, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(rates, [step.attainment for step in ordered], "-o", ms=3, color=colour, label=name)
    axes.axhline(share, color="#444444", linewidth=0.8, linestyle="--", label=f"asked for: {share:.0%}")
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlabel("requests per second")
    axes.set_ylabel("share within TTFT and TPOT")
    axes.legend(loc="lower left", fontsize=8, frameon=False)
    return figure


def distributions(collectors: Mapping[str, Collector], slo: Slo) -> Figure:
    """Distribution functions of TTFT and TPOT, with the targets."""
    figure, pair = _figure(7.6, 3.4, columns=2)
    from matplotlib.ticker import LogLocator, NullLocator

    for axes, metric, target in zip(pair, ("ttft", "tpot"), (slo.ttft, slo.tpot), strict=True):
        for (name, collector), colour in zip(collectors.items(), _COLOURS, strict=False):
            part = collector.window()
            seconds, shares = collector.tally.distribution(metric, part.begin, part.end)
            axes.step(1e3 * seconds, shares, where="post", color=colour, label=name)
        if target is not None:
            axes.axvline(1e3 * target, color="#444444", linewidth=0.8, linestyle="--", label="target")
        axes.axhline(slo.attainment, color="#444444", linewidth=0.5, linestyle=":")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, 1.02)
        axes.set_xlabel(f"{metric.upper()} (ms)")
        axes.set_ylabel("share of requests")
    _below(figure, pair[-1])
    return figure


def pools(series: PoolSeries) -> Figure:
    """A timeline of pools: the shares of time of steps with prompts and of decode, and sequences for each engine."""
    roles = [pool.role for pool in series.plan.pools if pool.role != "encode"]
    figure, rows = _figure(7.2, 1.2 + 1.5 * len(roles), rows=len(roles))
    for axes, role in zip(rows, roles, strict=True):
        seconds, (prompts, decode, sequences) = series.of(role)
        axes.stackplot(seconds, prompts, decode, colors=(_COLOURS[1], _COLOURS[0]), alpha=0.75,
                       labels=("steps with prompts", "decode steps"))  # fmt: skip
        axes.set_ylim(0, 1.05)
        axes.set_ylabel(f"{role}\nshare of time")
        other = axes.twinx()
        other.plot(seconds, sequences, color="#222222", linewidth=0.9, label="sequences per engine")
        other.set_ylabel("sequences")
        other.set_ylim(bottom=0)
        other.grid(visible=False)
    rows[-1].set_xlabel("seconds")
    _below(figure, rows[0], other)
    return figure


def _below(figure: Figure, *axes: Any) -> None:
    """One legend under the picture, where it hides nothing."""
    pairs = [each.get_legend_handles_labels() for each in axes]
    handles, labels = ([one for pair in pairs for one in pair[place]] for place in (0, 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)


def svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element; equal pictures are equal text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """As a file, by its suffix: .png or .svg. Raises PictureError for others."""
    import matplotlib

    if path.suffix not in (".png", ".svg"):
        raise PictureError(f"{path}: a picture is a .png or an .svg file")
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {}
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, format=path.suffix[1:], dpi=150, metadata=metadata)
