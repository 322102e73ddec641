"""Metrics of replay runs, tables that put policies beside FCFS, and the distributions of latency as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from replay_cases import Case

FCFS = "fcfs"
# What is shown for every policy: no mean without its tail.
METRICS = ("mean", "p50", "p95", "p99", "max", "s_per_token", "ttft_p99", "preemptions", "recomputed", "overhead_us")
_CASES_IN_A_ROW = 4


def percentile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest of values in order."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """One run's figures: latencies in seconds, `s_per_token` the mean over requests of latency by output token,
    `overhead_us` CPU microseconds of `schedule` and `update_from_output` for a step."""
    ordered = sorted(result["latency"])
    per_token = [seconds / tokens for seconds, tokens in zip(result["latency"], result["outputs"], strict=True)]
    return {
        "mean": statistics.fmean(ordered),
        "p50": percentile(ordered, 0.5),
        "p95": percentile(ordered, 0.95),
        "p99": percentile(ordered, 0.99),
        "max": ordered[-1],
        "s_per_token": statistics.fmean(per_token),
        "ttft_p99": percentile(sorted(result["first_token"]), 0.99),
        "preemptions": result["preemptions"],
        "recomputed": result["recomputed"],
        "overhead_us": result["overhead_s"] / result["steps"] * 1e6,
        "makespan": result["makespan"],
        "busy": result["busy"],
        "rate": result["rate"],
    }


def summary(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric over the seeds, and the largest `max` of any."""
    each = [metrics(result) for result in runs.values()]
    mean = {name: statistics.fmean(one[name] for one in each) for name in each[0]}
    return {**mean, "max_of_seeds": max(one["max"] for one in each)}


def against(ours: Mapping[int, Mapping[str, Any]], other: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Each metric of one policy by that of another on the same seeds: ratio of the means, and the seeds' extremes.

    Seeds that one of the two lacks do not count. A ratio by nothing is None, or 1 where both are nothing.
    """
    both = sorted(set(ours) & set(other))
    mine, theirs = [metrics(ours[seed]) for seed in both], [metrics(other[seed]) for seed in both]
    ratios: dict[str, Any] = {}
    for name in METRICS:
        above, below = [one[name] for one in mine], [one[name] for one in theirs]
        each = [ratio for a, b in zip(above, below, strict=True) if (ratio := _ratio(a, b)) is not None]
        ratios[name] = {
            "ratio": _ratio(sum(above), sum(below)),
            "least": min(each, default=None),
            "most": max(each, default=None),
        }
    return ratios


def _ratio(above: float, below: float) -> float | None:
    if below:
        return above / below
    return 1.0 if above == below else None


def rows_of(case: Case, results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[list[str]]:
    """Table rows of one case: figures, and for all but FCFS the change against it."""
    rows = []
    for policy, runs in results.items():
        figures = summary(runs)
        cells = [case.name, policy]
        change = against(runs, results[FCFS]) if FCFS in results and policy != FCFS else None
        for name in METRICS:
            text = _figure(figures[name])
            if change and (ratio := change[name]["ratio"]) is not None:
                text += f" ({(ratio - 1) * 100:+.0f} %)"
            cells.append(text)
        rows.append(cells)
    return rows


def _figure(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.4f}"


def draw(path: Path, results: Mapping[str, Mapping[str, Mapping[int, Mapping[str, Any]]]], caption: str) -> None:
    """The distribution of latency of every case and policy, pooled over seeds, as SVG or PNG by the file's name.

    The upper share is on a logarithmic axis, so that the tail shows. Raises ValueError where there is nothing to draw.
    """
    if not results:
        raise ValueError("nothing to draw")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "replay"
    columns = min(len(results), _CASES_IN_A_ROW)
    lines = -(-len(results) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.2 * lines + 0.5), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for axis, (name, policies) in zip(axes.flat, results.items(), strict=False):
        for policy, runs in policies.items():
            pooled = sorted(value for run in runs.values() for value in run["latency"])
            shares = _shares(len(pooled))
            axis.plot([percentile(pooled, share) for share in shares], [1 - share for share in shares], label=policy)
        axis.set(title=name, xscale="log", yscale="log", ylim=(5e-4, 1), xlabel="latency, s", ylabel="share above")
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), frameon=False)
    figure.suptitle(caption, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _shares(count: int) -> list[float]:
    """Shares of requests, dense where few are left, down to the last one."""
    points = 120
    return [1 - (1 / count) ** (index / points) for index in range(points)] + [1 - 1 / count]
