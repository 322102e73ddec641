"""Traces of the scheduler replay as rows: arrival where it was recorded, lengths, a class where one is known.

Azure's CSV and Mooncake's JSONL are read by the suite's own reader; here are the tables that carry a class or have no
arrivals, and ServeGen's archive, which describes clients and not requests. Any of them may be compressed with gzip.
"""

from __future__ import annotations

import ast
import csv
import gzip
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_suite.fleet.traces import TraceError, read_trace

# Prompt length where a table has none (the LMSYS one): near the mean of LMSYS-Chat's prompts.
UNRECORDED_PROMPT = 128
SERVEGEN_WINDOW_S = 600
SERVEGEN_LENGTHS_S = 21600


@dataclass(frozen=True, slots=True)
class Row:
    """One recorded request.

    Attributes:
        arrival_s: seconds from the first request of its file; None where no arrivals were recorded.
        prompt, output: tokens, at least 1.
        label: what a server would know of its kind beforehand (client, predicted class); "" for nothing.
        prefix: content of the prompt's leading blocks of 512 tokens, as ids (Mooncake); empty: shared with nobody.
    """

    arrival_s: float | None
    prompt: int
    output: int
    label: str = ""
    prefix: tuple[int, ...] = ()


@dataclass(frozen=True)
class Columns:
    """A table's dialect: the columns that make it known, and what they hold."""

    output: str
    prompt: str | None = None
    arrival: str | None = None
    label: str | None = None

    def named(self) -> list[str]:
        return [name for name in (self.arrival, self.label, self.prompt, self.output) if name]


TABLES = (
    Columns(arrival="arrival_s", label="client", prompt="input_tokens", output="output_tokens"),  # ServeGen, sampled
    Columns(label="pred_multi_cls", output="output_token_length"),  # SSJF's LMSYS table
    Columns(prompt="num_prefill_tokens", output="num_decode_tokens"),  # Vidur
    Columns(arrival="Timestamp", prompt="Request tokens", output="Response tokens"),  # BurstGPT
)


@dataclass(frozen=True)
class Client:
    """One client of ServeGen's archive.

    Attributes:
        windows: start in seconds of a day -> (requests per second, CV of the gaps, "Gamma" | "Weibull", shape).
        lengths: start of a window of six hours -> (prompt lengths, output lengths), each length -> probability.
    """

    name: str
    windows: Mapping[int, tuple[float, float, str, float]]
    lengths: Mapping[int, tuple[Mapping[int, float], Mapping[int, float]]]


def read_rows(path: Path) -> list[Row]:
    """All requests of one trace file. Raises TraceError with file, line and reason."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".csv", ".jsonl")):
        raise TraceError(f"{path}: a trace is a .csv, .jsonl or ServeGen's .tar.gz, the first two also with .gz")
    if name.endswith(".csv"):
        header = _header(path)
        for table in TABLES:
            if set(table.named()) <= set(header):
                return _table(path, table, header)
    trace = read_trace(path, 1 << 62)
    return [
        Row(entry.arrival_s, entry.input_tokens, max(1, entry.output_tokens), "", entry.prefix_ids)
        for entry in trace.requests
    ]


def read_servegen(path: Path) -> list[Client]:
    """The clients of a ServeGen archive in order of their number. Raises TraceError."""
    texts: dict[tuple[int, str], str] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                found = re.search(r"chunk-(\d+)-(trace\.csv|dataset\.json)$", member.name)
                content = archive.extractfile(member) if found else None
                if found and content:
                    texts[int(found[1]), found[2]] = content.read().decode()
    except (OSError, EOFError, UnicodeDecodeError, tarfile.TarError) as error:
        raise TraceError(f"{path}: {error}") from error
    numbers = sorted({number for number, _ in texts})
    if not numbers:
        raise TraceError(f"{path}: no chunk-N-trace.csv in the archive")
    clients = []
    for number in numbers:
        missing = [kind for kind in ("trace.csv", "dataset.json") if (number, kind) not in texts]
        if missing:
            raise TraceError(f"{path}: chunk-{number}-{missing[0]} is missing")
        windows = dict(_windows(f"{path}!chunk-{number}-trace.csv", texts[number, "trace.csv"]))
        lengths = _lengths(f"{path}!chunk-{number}-dataset.json", texts[number, "dataset.json"])
        clients.append(Client(str(number), windows, lengths))
    return clients


def _open(path: Path) -> io.TextIOBase:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")  # type: ignore[return-value]
    return path.open(encoding="utf-8", newline="")


def _header(path: Path) -> list[str]:
    try:
        with _open(path) as lines:
            return [name.strip().lstrip("\ufeff") for name in next(csv.reader(lines), [])]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error


def _table(path: Path, table: Columns, header: list[str]) -> list[Row]:
    at = {name: header.index(name) for name in table.named()}
    rows: list[Row] = []
    try:
        with _open(path) as lines:
            reader = csv.reader(lines)
            next(reader)
            for cells in reader:
                if not cells:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise TraceError(f"{where}: {len(header)} columns are expected, found {len(cells)}")
                rows.append(
                    Row(
                        _number(where, table.arrival, cells[at[table.arrival]], 0) if table.arrival else None,
                        _count(where, table.prompt, cells[at[table.prompt]]) if table.prompt else UNRECORDED_PROMPT,
                        _count(where, table.output, cells[at[table.output]]),
                        cells[at[table.label]].strip() if table.label else "",
                    )
                )
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    if not rows:
        raise TraceError(f"{path}: no request in the trace")
    if table.arrival:
        rows.sort(key=lambda row: row.arrival_s or 0.0)
    return rows


def _number(where: str, name: str, text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        raise TraceError(f"{where}: {name} must be a number of at least {least:g}, found {text!r}")
    return value


def _count(where: str, name: str, text: str) -> int:
    value = _number(where, name, text, 0)
    if value != int(value):
        raise TraceError(f"{where}: {name} must be a whole number, found {text!r}")
    return max(1, int(value))


def _windows(where: str, text: str) -> Iterator[tuple[int, tuple[float, float, str, float]]]:
    for line, cells in enumerate(csv.reader(io.StringIO(text)), start=1):
        if not cells:
            continue
        if len(cells) != 6:
            raise TraceError(f"{where}:{line}: 6 columns are expected, found {len(cells)}")
        start, rate, spread = (_number(f"{where}:{line}", "a time, rate or CV", cell, 0) for cell in cells[:3])
        if rate == 0:
            continue
        if cells[3] not in ("Gamma", "Weibull"):
            raise TraceError(f"{where}:{line}: the pattern is Gamma or Weibull, found {cells[3]!r}")
        yield int(start), (rate, spread, cells[3], _number(f"{where}:{line}", "the shape", cells[4], 0))


def _lengths(where: str, text: str) -> dict[int, tuple[Mapping[int, float], Mapping[int, float]]]:
    try:
        document = json.loads(text)
        found = {
            int(start): (_density(window["input_tokens"]), _density(window["output_tokens"]))
            for start, window in document.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise TraceError(f"{where}: {type(error).__name__}: {error}") from error
    # An empty density is a client that was idle in the window.
    return {start: both for start, both in found.items() if both[0] and both[1]}


def _density(text: str) -> dict[int, float]:
    # The archive holds Python dicts as strings.
    table: Any = ast.literal_eval(text)
    return {max(1, int(length)): float(share) for length, share in table.items() if share > 0}
