"""Requests out of the result files of load generators: `vllm bench serve` and guidellm.

Both write one JSON document, which is read whole. Requests that failed are left out, and said so.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vllm_suite.fleet.traces import TraceError, whole_number
from vllm_suite.planner.traces.rows import Row, number


def vllm_bench(path: Path, text: str) -> tuple[list[Row], list[str]]:
    """`vllm bench serve --save-result --save-detailed`; of several appended results the last one.

    Returns:
        Requests and notes. Arrivals are the recorded starts, if they were the client's plan: not with a limit of
        concurrency, under which a request starts when another ends, and not at an infinite rate.

    Raises:
        TraceError: no JSON, or no lengths of single requests.
    """
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    whole = _parsed(path, last if last.lstrip().startswith("{") and len(last) > 2 else text)
    if "input_lens" not in whole:
        raise TraceError(
            f"{path}: a result of vllm bench without lengths of its requests; run it with --save-result --save-detailed"
        )
    prompts, outputs = _list(path, whole, "input_lens"), _list(path, whole, "output_lens")
    if len(prompts) != len(outputs):
        raise TraceError(f"{path}: {len(prompts)} input_lens and {len(outputs)} output_lens")
    starts, errors, notes = whole.get("start_times") or [], whole.get("errors") or [], []
    planned = len(starts) == len(prompts) and whole.get("request_rate") != "inf" and not whole.get("max_concurrency")
    if not planned:
        notes.append("start times are not the client's plan (closed loop, no rate, or not recorded): lengths only")
    rows = []
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if index < len(errors) and errors[index]:
            continue
        where = f"{path}: request {index}"
        arrival = number(where, "start_times", starts[index]) if planned else math.nan
        rows.append(
            Row(arrival, whole_number(where, "input_lens", prompt, 1), whole_number(where, "output_lens", output, 0))
        )
    if len(rows) < len(prompts):
        notes.append(f"{len(prompts) - len(rows)} requests that failed are left out")
    return rows, notes


def guidellm(path: Path, text: str, part: int | None = None) -> tuple[list[Row], list[str]]:
    """guidellm's JSON report (0.2 to 0.8): `benchmarks`, each with `requests` by status.

    Args:
        part: which benchmark, from 0; None for all, whose lengths are joined and whose arrivals are left.

    Raises:
        TraceError: no such part, or requests without lengths.
    """
    whole = _parsed(path, text)
    benchmarks = _list(path, whole, "benchmarks")
    if part is not None and not 0 <= part < len(benchmarks):
        raise TraceError(f"{path}: no benchmark {part}; there are {len(benchmarks)}, counted from 0")
    chosen = benchmarks if part is None else [benchmarks[part]]
    notes = []
    if len(chosen) > 1:
        notes.append(f"lengths of {len(chosen)} benchmarks joined; name one for its arrivals")
    rows, failed = [], 0
    for index, benchmark in enumerate(chosen):
        requests = benchmark.get("requests") if isinstance(benchmark, dict) else None
        if not isinstance(requests, dict) or not isinstance(requests.get("successful"), list):
            raise TraceError(f"{path}: benchmark {part or index} has no requests.successful, a list")
        failed += sum(len(requests.get(status) or []) for status in ("incomplete", "errored"))
        open_loop = _open_loop(benchmark)
        if not open_loop and len(chosen) == 1:
            notes.append("start times are not the client's plan (closed loop, no rate, or not recorded): lengths only")
        for place, entry in enumerate(requests["successful"]):
            where = f"{path}: benchmark {part or index}, request {place}"
            if not isinstance(entry, dict):
                raise TraceError(f"{where}: an object is expected")
            rows.append(
                Row(
                    _start(where, entry) if open_loop and len(chosen) == 1 else math.nan,
                    whole_number(where, "prompt_tokens", entry.get("prompt_tokens"), 1),
                    whole_number(where, "output_tokens", entry.get("output_tokens"), 0),
                )
            )
    if failed:
        notes.append(f"{failed} requests that failed or were cut off are left out")
    return rows, notes


def _open_loop(benchmark: dict[str, Any]) -> bool:
    """Whether a strategy sent requests by the clock. `args` is its place in versions 0.2 and 0.3."""
    for holder in (benchmark.get("config"), benchmark.get("args")):
        strategy = holder.get("strategy") if isinstance(holder, dict) else None
        if isinstance(strategy, dict):
            return strategy.get("type_", strategy.get("kind")) in ("constant", "poisson", "trace", "replay")
    return False


def _start(where: str, entry: dict[str, Any]) -> float:
    timings = (entry.get("info") or {}).get("timings") or {}
    for value in (timings.get("targeted_start"), entry.get("request_start_time"), entry.get("start_time")):
        if value is not None:
            return number(where, "start time", value)
    raise TraceError(f"{where}: no start time (info.timings.targeted_start, request_start_time or start_time)")


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise TraceError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(whole, dict):
        raise TraceError(f"{path}: an object is expected, found {type(whole).__name__}")
    return whole


def _list(path: Path, whole: dict[str, Any], name: str) -> list[Any]:
    found = whole.get(name)
    if not isinstance(found, list):
        raise TraceError(f"{path}: no list {name}")
    return found
