"""Rows of traces that are written one request a line, and the file that they come from."""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_suite.fleet.traces import (
    MOONCAKE_BLOCK_TOKENS,
    TraceError,
    TraceRequest,
    azure_rows,
    json_object,
    mooncake_rows,
    whole_number,
)

Parse = Callable[[Path, Iterable[str]], Iterator["Row"]]


class Row(NamedTuple):
    """One recorded request: seconds from any start (nan where none was recorded), tokens, ids of prefix blocks."""

    arrival: float
    prompt: int
    output: int
    prefix: tuple[int, ...] = ()


BLOCK = MOONCAKE_BLOCK_TOKENS
"""Tokens that an id of `Row.prefix` stands for."""


def opened(path: Path) -> io.TextIOWrapper:
    """The file as text; gzip is known by its first bytes, whatever the name. Raises OSError."""
    raw = path.open("rb")
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return io.TextIOWrapper(gzip.GzipFile(fileobj=raw) if packed else raw, encoding="utf-8-sig", newline="")


def azure(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """Azure's CSV, 2023 and 2024."""
    return map(_shared, azure_rows(path, lines))


def mooncake(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """Mooncake's JSONL: milliseconds, lengths, `hash_ids` of blocks of 512 tokens."""
    return map(_shared, mooncake_rows(path, lines))


def _shared(row: TraceRequest) -> Row:
    return Row(row.arrival_s, row.input_tokens, row.output_tokens, row.prefix_ids)


def apex(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """APEX's JSONL: `StartTimeOffset` in nanoseconds, `ContextTokens`, `GeneratedTokens`."""
    for where, entry in _objects(path, lines):
        yield Row(
            number(where, "StartTimeOffset", entry.get("StartTimeOffset")) * 1e-9,
            whole_number(where, "ContextTokens", entry.get("ContextTokens"), 1),
            whole_number(where, "GeneratedTokens", entry.get("GeneratedTokens"), 0),
        )


def servingsim(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """LLMServingSim's requests.jsonl of a measured run: arrivals by the client's clock, and lengths."""
    for where, entry in _objects(path, lines):
        yield Row(
            number(where, "arrival_time", entry.get("arrival_time")),
            whole_number(where, "input_toks", entry.get("input_toks"), 1),
            whole_number(where, "output_toks", entry.get("output_toks"), 0),
        )


_COLUMNS = {
    "arrival": ("arrival_s", "arrival", "arrived_at", "timestamp_s"),
    "prompt": ("input_tokens", "prompt_tokens", "num_prefill_tokens", "input_length", "context_tokens"),
    "output": ("output_tokens", "generated_tokens", "num_decode_tokens", "output_length", "output_token_length"),
}


def columns(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    """A CSV with a column of prompt lengths, one of output lengths and, where there are any, arrivals in seconds."""
    rows = csv.reader(lines)
    header = [name.strip().lower() for name in next(rows, [])]
    place = {kind: next((header.index(name) for name in names if name in header), None)
             for kind, names in _COLUMNS.items()}  # fmt: skip
    for kind in ("prompt", "output"):
        if place[kind] is None:
            raise TraceError(f"{path}:1: no column {' or '.join(_COLUMNS[kind])}; found {', '.join(header) or 'none'}")
    arrival, prompt, output = place["arrival"], place["prompt"], place["output"]
    assert prompt is not None
    assert output is not None
    for row in rows:
        if not row:
            continue
        where = f"{path}:{rows.line_num}"
        if len(row) != len(header):
            raise TraceError(f"{where}: {len(header)} columns are expected, found {len(row)}")
        yield Row(
            math.nan if arrival is None else number(where, header[arrival], row[arrival]),
            whole_number(where, header[prompt], row[prompt], 1),
            whole_number(where, header[output], row[output], 0),
        )


def number(where: str, name: str, value: Any) -> float:
    """A finite number of a row. Raises TraceError."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise TraceError(f"{where}: {name} must be a number, found {value!r}")
    return found


def _objects(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line_number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{line_number}"
            yield where, json_object(where, line)
