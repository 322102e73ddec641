"""Results of an evaluation as rows, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_swiftkv.evaluate_tasks import Request


@dataclass
class Row:
    """One metric of one requested task.

    ``metric`` is the harness's name, with its filter where there is more than one. ``headline`` rows make the
    average. ``base`` is the same metric of the base model.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    skip: bool | None
    headline: bool
    higher_is_better: bool | None
    version: Any = None
    shots: int | None = None
    samples: int | None = None
    base: float | None = None
    base_stderr: float | None = None

    @property
    def difference(self) -> float | None:
        return None if self.base is None else self.value - self.base


@dataclass
class Evaluation:
    """What the runs of a model, and of its base model, have given so far."""

    requests: Sequence[Request]
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    base: dict[tuple[str, str], Row] = field(default_factory=dict)

    def add(self, result: dict[str, Any], base: bool = False) -> None:
        """Take in one engine run."""
        for request in self.requests:
            if request.name in result["requests"]:
                for row in rows(request, result["requests"][request.name]["results"], result["skip"]):
                    (self.base if base else self.rows)[row.task, row.metric] = row

    def joined(self) -> list[Row]:
        """Rows in the order of the requests, the base model's figures beside each."""
        order = {request.name: i for i, request in enumerate(self.requests)}
        for key, row in self.rows.items():
            if key in self.base:
                row.base, row.base_stderr = self.base[key].value, self.base[key].stderr
        return sorted(self.rows.values(), key=lambda row: order[row.task])


def rows(request: Request, results: dict[str, Any], skip: bool | None) -> list[Row]:
    """Rows of one task or group out of the harness's results; a tag gives one row per task's metric, by its name."""
    name = request.name
    found = results["results"].get(name)
    if found is None:  # a tag: the plain mean over its tasks is nobody's metric, so they stay apart
        return [
            row
            for task in results["results"]
            for row in _of(task, request.model_copy(update={"headline": None}), results, results["results"][task], skip)
        ]
    return _of(name, request, results, found, skip)


def _of(task: str, request: Request, results: dict[str, Any], found: dict[str, Any], skip: bool | None) -> list[Row]:
    keys = [key for key in found if "," in key and "_stderr," not in key and _number(found[key]) is not None]
    headline = request.headline or next(iter(keys), None)
    better = results.get("higher_is_better", {}).get(task) or {}
    samples = (results.get("n-samples") or {}).get(task) or {}
    made = []
    for key in keys:
        metric, _, chosen = key.partition(",")
        made.append(
            Row(
                task=request.name,
                metric=_label(task, request, metric, chosen),
                value=float(found[key]),
                stderr=_number(found.get(f"{metric}_stderr,{chosen}")),
                skip=skip,
                headline=key == headline and request.averaged,
                higher_is_better=better.get(metric),
                version=(results.get("versions") or {}).get(task),
                shots=(results.get("n-shot") or {}).get(task),
                samples=samples.get("effective"),
            )
        )
    return made


def _label(task: str, request: Request, metric: str, chosen: str) -> str:
    name = metric if chosen == "none" else f"{metric}, {chosen}"
    return name if task == request.name else f"{task}: {name}"


def _number(value: Any) -> float | None:
    """The harness writes "N/A" where there is no standard error."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else None


def average(found: Iterable[Row]) -> dict[str, Any] | None:
    """Plain mean of the headline metrics, as the paper's tables have it; None where there is none to take.

    A metric that is better when lower stays out. The base model's mean is over the same metrics, and there only
    where it has all of them.
    """
    taken = [row for row in found if row.headline and row.higher_is_better is not False]
    if not taken:
        return None
    value = sum(row.value for row in taken) / len(taken)
    bases = [row.base for row in taken if row.base is not None]
    base = sum(bases) / len(bases) if len(bases) == len(taken) else None
    return {
        "tasks": len(taken),
        "value": value,
        "base": base,
        "difference": None if base is None else value - base,
    }


def as_json(found: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON objects."""
    return [asdict(row) | {"difference": row.difference} for row in found]


def table(found: Sequence[Row], title: str, base: bool) -> Any:
    """The rows and their average as a rich table."""
    from rich.table import Table

    made = Table(title=title)
    for name in ("task", "metric"):
        made.add_column(name, overflow="fold")
    for name in ("value", "stderr", "skip", *(("base", "difference") if base else ())):
        made.add_column(name, justify="right", no_wrap=True)
    for row in found:
        skip = {None: "-", False: "off", True: "on"}[row.skip]
        cells = [row.task, row.metric, _figure(row.value), _figure(row.stderr), skip]
        made.add_row(*cells, *((_figure(row.base), _figure(row.difference, sign=True)) if base else ()))
    mean = average(found)
    if mean is not None and mean["tasks"] > 1:
        made.add_section()
        cells = [f"average of {mean['tasks']}", "", _figure(mean["value"]), "", ""]
        made.add_row(*cells, *((_figure(mean["base"]), _figure(mean["difference"], sign=True)) if base else ()))
    return made


def _figure(value: float | None, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.4f}"
