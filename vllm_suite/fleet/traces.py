"""Request traces: Azure CSV, Mooncake JSONL, and a synthetic sample where there is neither.

Only arrival times, prompt lengths and shared prefixes of a trace are used. The recorded output lengths are kept
for reports; they must never become `max_tokens`, which would tell the scheduler what it cannot know.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

ENV_DATA = "VLLM_SUITE_DATA"
AZURE_HEADER = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MOONCAKE_BLOCK_TOKENS = 512
_DEFAULTS = ("AzureLLMInferenceTrace_2023_conv.csv", "mooncake_synthetic_trace.jsonl.gz")


class TraceError(ValueError):
    """The trace cannot be read; the text names file, line and what was expected."""


@dataclass(frozen=True)
class TraceRequest:
    """One recorded request.

    `arrival_s` counts from the first request of the trace. `prefix_ids` name the blocks of 512 tokens that the
    prompt begins with; equal ids mean equal content (Mooncake only).
    """

    arrival_s: float
    input_tokens: int
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival. `name` is for reports: a file name, or `synthetic-SEED`."""

    name: str
    requests: tuple[TraceRequest, ...]


def load_trace(path: Path | None, limit: int, seed: int = 0) -> Trace:
    """The first `limit` requests of `path`, of the default trace, or of a synthetic one.

    Without a path the Azure conversation trace is looked for, then Mooncake's synthetic one, both in the folder
    `traces` of the data folder (`VLLM_SUITE_DATA`, else `../shared/data` beside the project). Raises TraceError.
    """
    if path is None:
        path = default_trace()
    if path is None:
        return synthetic_trace(limit, seed)
    return read_trace(path, limit)


def default_trace() -> Path | None:
    """The first of the known traces that is on this machine."""
    data = os.environ.get(ENV_DATA)
    root = Path(data) if data else Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return next((path for name in _DEFAULTS if (path := root / "traces" / name).is_file()), None)


def read_trace(path: Path, limit: int) -> Trace:
    """The first `limit` requests of a .csv (Azure) or .jsonl (Mooncake) file, either also as .gz."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".csv"):
        parse = azure_rows
    elif name.endswith(".jsonl"):
        parse = mooncake_rows
    else:
        raise TraceError(f"{path}: a trace is a .csv (Azure) or .jsonl (Mooncake) file, or either with .gz")
    try:
        with _open(path) as lines:
            requests = list(islice(parse(path, lines), limit))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: {error}") from error
    if not requests:
        raise TraceError(f"{path}: no request in the trace")
    requests.sort(key=lambda request: request.arrival_s)
    start = requests[0].arrival_s
    shifted = (TraceRequest(r.arrival_s - start, r.input_tokens, r.output_tokens, r.prefix_ids) for r in requests)
    return Trace(path.name, tuple(shifted))


def synthetic_trace(limit: int, seed: int = 0) -> Trace:
    """Poisson arrivals, 5 requests a second; log-normal prompt lengths, median 500 tokens, sigma 1.

    One request in four repeats the first one to four blocks of an earlier prompt.
    """
    draw = random.Random(seed)
    requests: list[TraceRequest] = []
    clock, next_id = 0.0, 0
    for _ in range(limit):
        length = max(8, min(8192, round(draw.lognormvariate(math.log(500), 1.0))))
        blocks = -(-length // MOONCAKE_BLOCK_TOKENS)
        shared: tuple[int, ...] = ()
        if requests and draw.random() < 0.25:
            shared = draw.choice(requests).prefix_ids[: min(draw.randint(1, 4), blocks)]
        fresh = blocks - len(shared)
        requests.append(
            TraceRequest(
                arrival_s=clock,
                input_tokens=length,
                output_tokens=max(1, round(draw.lognormvariate(math.log(150), 0.8))),
                prefix_ids=(*shared, *range(next_id, next_id + fresh)),
            )
        )
        next_id += fresh
        clock += draw.expovariate(5.0)
    return Trace(f"synthetic-{seed}", tuple(requests))


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def azure_rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    """Rows of an Azure CSV of 2023 or 2024; `arrival_s` counts from 1970. Raises TraceError with the line."""
    rows = csv.reader(lines)
    header = tuple(column.strip().lstrip("\ufeff") for column in next(rows, []))
    if header != AZURE_HEADER:
        raise TraceError(f"{path}:1: the header must be {','.join(AZURE_HEADER)}, found {','.join(header)!r}")
    for row in rows:
        if not row:
            continue
        where = f"{path}:{rows.line_num}"
        if len(row) != len(AZURE_HEADER):
            raise TraceError(f"{where}: {len(AZURE_HEADER)} columns are expected, found {len(row)}")
        yield TraceRequest(
            arrival_s=_timestamp(where, row[0]),
            input_tokens=whole_number(where, AZURE_HEADER[1], row[1], 1),
            output_tokens=whole_number(where, AZURE_HEADER[2], row[2], 0),
        )


def _timestamp(where: str, text: str) -> float:
    # 2023: seven digits of a second and no zone, 2024: six or none and +00:00. Without a zone it counts as UTC.
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise TraceError(f"{where}: TIMESTAMP is not a date and time: {text!r}") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def mooncake_rows(path: Path, lines: Iterable[str]) -> Iterator[TraceRequest]:
    """Rows of Mooncake's JSONL; `arrival_s` as recorded. Raises TraceError with the line."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        entry = json_object(where, line)
        ids = entry.get("hash_ids", [])
        if not isinstance(ids, list) or not all(type(item) is int for item in ids):
            raise TraceError(f"{where}: hash_ids is not a list of whole numbers")
        length = whole_number(where, "input_length", entry.get("input_length"), 1)
        if len(ids) > -(-length // MOONCAKE_BLOCK_TOKENS):
            raise TraceError(f"{where}: {len(ids)} hash_ids for {length} tokens; each names 512 tokens")
        yield TraceRequest(
            arrival_s=whole_number(where, "timestamp", entry.get("timestamp"), 0) / 1000,
            input_tokens=length,
            output_tokens=whole_number(where, "output_length", entry.get("output_length"), 0),
            prefix_ids=tuple(ids),
        )


def json_object(where: str, text: str) -> dict[str, Any]:
    """The object of a JSON line. Raises TraceError where it is anything else."""
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(f"{where}: not JSON: {error}") from error
    if not isinstance(entry, dict):
        raise TraceError(f"{where}: an object is expected, found {type(entry).__name__}")
    return entry


def whole_number(where: str, name: str, value: object, least: int) -> int:
    """The value of a field of a row. Raises TraceError where it is no whole number, or less than `least`."""
    try:
        number = int(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None
    except ValueError:
        number = None
    if number is None or number < least:
        raise TraceError(f"{where}: {name} must be a whole number of at least {least}, found {value!r}")
    return number
