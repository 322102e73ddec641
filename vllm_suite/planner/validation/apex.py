"""A1 to A5: APEX's plan space, measured vLLM on 8 x H100, and APEX's own outputs by its own rules."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_suite.planner.apex.engine import Ask, simulate
from vllm_suite.planner.apex.kernels import AicKernels, exchanges
from vllm_suite.planner.apex.space import Block, Scheme, schemes
from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import SourceError
from vllm_suite.planner.validation import apex_measured
from vllm_suite.planner.validation.check import Check, Verdict, not_run

PROFILES = "VLLM_SUITE_APEX_COMM"
"""The environment variable with APEX's profiles of collectives on H100."""

_ORIGIN = "APEX's engine with AIConfigurator's tables in the place of its own"
_QUANTITIES = (("TTFT, ms", "ttft_ms"), ("TPOT, ms", "tpot_ms"), ("busy time, s", "busy_s"))


def checks(data: Path, comm: Path | None = None) -> Iterator[Check]:
    """A1 to A5.

    Args:
        data: as ../data's README describes it.
        comm: ``profile/comm/H100-SXM-80GB`` of microsoft/apex_plus; None for what the environment names.
    """
    yield from plans(data)
    yield from apex_measured.checks(data)
    yield from parity(data, comm)


def published(path: Path) -> dict[Scheme, dict[str, Any]]:
    """APEX's output of every scheme of a run."""
    return {
        Scheme(row["model_replicas"], row["stages"], _cell(row["attn"]), _cell(row["ffn"])): row
        for row in json.loads(path.read_text(encoding="utf-8"))
    }


def _cell(text: str) -> tuple[int, int]:
    replicas, devices = text.split("x dp, tp")
    return int(replicas), int(devices)


def _runs(data: Path) -> list[Path]:
    return sorted((data / "measured" / "apex_runs").glob("llama70b_8xH100_*.json"))


def plans(data: Path) -> Iterator[Check]:
    """A1."""
    what = "plans of Llama-70B on 8 x H100"
    model, quant = load("meta-llama/Llama-3.1-70B")
    ours = list(schemes(Block.of(model, quant), cluster("8xH100-SXM")))
    for path in _runs(data)[:1]:
        theirs = set(published(path))
        error = float(len(theirs ^ set(ours)))
        note = "" if not error else f"not in both: {sorted(each.name for each in theirs ^ set(ours))}"
        verdict: Verdict = "holds" if not error else "missed"
        yield Check("A1", what, len(ours), len(theirs), "microsoft/apex_plus", error, "exact", verdict, note=note)
    if not _runs(data):
        yield not_run("A1", what, f"no measured/apex_runs in {data}", "microsoft/apex_plus")


def requests(path: Path) -> list[Ask]:
    """A trace as APEX reads it: whole microseconds."""
    asked = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [Ask(row["StartTimeOffset"] // 1000, row["ContextTokens"], row["GeneratedTokens"]) for row in asked]


def parity(data: Path, comm: Path | None = None) -> Iterator[Check]:
    """A5; the arguments are those of `checks`."""
    named = os.environ.get(PROFILES)
    comm = comm or (Path(named) if named else None)
    what = "APEX's engine on its 26 plans"
    if comm is None:
        yield not_run("A5", what, f"name profile/comm/H100-SXM-80GB of microsoft/apex_plus in {PROFILES}", _ORIGIN)
        return
    try:
        kernels, moves = AicKernels(AicTables.of("H100-SXM")), exchanges(comm)
    except SourceError as error:
        yield not_run("A5", what, str(error), _ORIGIN)
        return
    model, quant = load("meta-llama/Llama-3.1-70B")
    block, machine = Block.of(model, quant), cluster("8xH100-SXM")
    for path in _runs(data):
        name = path.stem.removeprefix("llama70b_8xH100_")
        asked = requests(data / "measured" / "apex_traces" / f"llama_{name}.jsonl")
        rows = published(path)
        found = {scheme: simulate(scheme, block, machine, kernels, moves, asked) for scheme in rows}
        for label, key in _QUANTITIES:
            off = {
                scheme: getattr(each, key) / rows[scheme][key] - 1 if each is not None else float("inf")
                for scheme, each in found.items()
            }
            worst = max(off, key=lambda scheme: abs(off[scheme]))
            mean = sum(map(abs, off.values())) / len(off)
            yield Check(
                "A5",
                f"{label}, {name}: the plan of {len(off)} that is furthest off",
                getattr(found[worst], key, None),
                rows[worst][key],
                _ORIGIN,
                off[worst],
                "0.02",
                "holds" if abs(off[worst]) <= 0.02 else "missed",
                note=f"{worst.name}; mean of all {mean:.2%}",
            )
