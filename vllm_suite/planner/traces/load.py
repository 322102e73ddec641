"""From a trace file to a workload: which format it is, and what it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_suite.fleet.traces import AZURE_HEADER, TraceError, default_trace
from vllm_suite.planner.traces import documents, rows
from vllm_suite.planner.traces.rows import Row
from vllm_suite.planner.traces.table import Table
from vllm_suite.planner.traces.workload import Rows, Workload

_LINES: dict[str, rows.Parse] = {
    "azure": rows.azure,
    "mooncake": rows.mooncake,
    "apex": rows.apex,
    "servingsim": rows.servingsim,
    "csv": rows.columns,
}
FORMATS = ("auto", *_LINES, "vllm-bench", "guidellm")
"""What `load` reads. Each also packed with gzip."""

_KEYS = {"hash_ids": "mooncake", "input_length": "mooncake", "StartTimeOffset": "apex", "input_toks": "servingsim",
         "input_lens": "vllm-bench", "request_throughput": "vllm-bench", "benchmarks": "guidellm"}  # fmt: skip

KEPT = 2_000_000
"""Requests that are kept in memory, 16 bytes each; a longer trace is read again for every run."""


def load(path: Path | None, format: str = "auto", *, part: int | None = None, kept: int = KEPT) -> Workload:
    """A recorded workload.

    Every row is read once, so that a bad one is found before anything is simulated. An output of 0 tokens counts as 1,
    and `Workload.notes` says how many there were.

    Args:
        path: the file; None for the default trace of the data folder (`fleet.traces.default_trace`).
        format: of `FORMATS`; ``auto`` tells it from the beginning of the file.
        part: which benchmark of a guidellm report.
        kept: requests up to which the trace is kept in memory.

    Raises:
        TraceError: no file, an unknown format, or a bad row; with the line and the reason.
    """
    if path is None:
        path = default_trace()
        if path is None:
            raise TraceError("no trace was named, and there is no default one; set VLLM_SUITE_DATA, or give lengths")
    if format not in FORMATS:
        raise TraceError(f"{path}: no format {format}; known are {', '.join(FORMATS)}")
    try:
        kind = _detected(path) if format == "auto" else format
        if kind in _LINES:
            return _from_lines(path, _LINES[kind], kept)
        with rows.opened(path) as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    found, notes = documents.vllm_bench(path, text) if kind == "vllm-bench" else documents.guidellm(path, text, part)
    if found and all(math.isfinite(row.arrival) for row in found):
        found.sort(key=lambda row: row.arrival)
    return _made(path, found, notes, kept)


def _detected(path: Path) -> str:
    with rows.opened(path) as file:
        first = next((line for line in file if line.strip()), "").strip()
    if not first:
        raise TraceError(f"{path}: no request in the trace")
    if not first.startswith("{"):
        header = tuple(column.strip() for column in first.split(","))
        return "azure" if AZURE_HEADER[0] in header or header[1:] == AZURE_HEADER[1:] else "csv"
    try:
        keys = json.loads(first)
    except json.JSONDecodeError:
        # A document over several lines; of the two tools guidellm is the one that writes them.
        return "guidellm" if first == "{" else "mooncake"
    for key, kind in _KEYS.items():
        if key in keys:
            return kind
    raise TraceError(f"{path}:1: no known format has these keys: {', '.join(keys) or 'none'}; name it with --format")


@dataclass(frozen=True)
class _File:
    """Rows of a file, read again at every call."""

    path: Path
    parse: rows.Parse

    def __call__(self, seed: int) -> Iterator[Row]:
        try:
            with rows.opened(self.path) as lines:
                for row in self.parse(self.path, lines):
                    yield row if row.output > 0 else row._replace(output=1)
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise TraceError(f"{self.path}: {error}") from error


def _from_lines(path: Path, parse: rows.Parse, kept: int) -> Workload:
    with rows.opened(path) as lines:
        return _made(path, parse(path, lines), [], kept, _File(path, parse))


def _made(path: Path, found: Iterable[Row], notes: list[str], kept: int, again: Rows | None = None) -> Workload:
    table = Table(kept)
    for row in found:
        try:
            table.add(row)
        except OverflowError as error:
            raise TraceError(f"{path}: request {table.count}: a number is too large: {row}") from error
    if not table.count:
        raise TraceError(f"{path}: no request in the trace")
    table.close()
    if table.count > kept and not table.ordered:
        raise TraceError(f"{path}: not in order of arrival, and too long to be sorted ({table.count} requests)")
    if not table.ordered:
        notes.append("was not in order of arrival; sorted")
    if table.zeros:
        notes.append(f"{table.zeros} requests without output count as 1 token")
    span = table.last - table.first if math.isfinite(table.last - table.first) else 0.0
    return Workload(
        name=path.name,
        rows=table.rows if again is None or table.count <= kept else again,
        count=table.count,
        rate=(table.count - 1) / span if span > 0 else None,
        span=span,
        mean_prompt=table.prompts / table.count,
        mean_output=table.outputs / table.count,
        fingerprint=table.fingerprint,
        notes=tuple(notes),
    )
