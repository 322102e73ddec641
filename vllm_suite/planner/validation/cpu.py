"""End to end on CPU: predicted beside what real engines did, from the result of `benchmarks/planner_cpu.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_suite.planner.validation.check import Check, not_run, relative

RESULT = Path(__file__).resolve().parents[3] / "benchmarks" / "results" / "planner_cpu.cpu-2core.json"
_TOLERANCES = {"ttft_mean": 0.10, "ttft_p99": 0.20, "tpot_mean": 0.10, "tpot_p99": 0.20}
_ORIGIN = "vLLM on two CPU cores, benchmarks/planner_cpu.py"


def checks(data: Path) -> Iterator[Check]:
    """Each load and plan: mean and p99 of TTFT and TPOT, and which plan is better.

    Args:
        data: unused; the measurement is the repository's own and is repeated with ``benchmarks/planner_cpu.py``.
    """
    try:
        result: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    except FileNotFoundError:
        yield not_run("CPU", "calibrated prediction of a held-out trace", f"{RESULT.name} is not there", _ORIGIN)
        return
    yield from of_result(result)


def of_result(result: dict[str, Any]) -> Iterator[Check]:
    """The checks of one result."""
    held_out = (result["calibration"]["beside"] or result["calibration"]["alone"])["held_out"]
    yield Check(
        "CPU0",
        "held-out error of a calibrated step, mean",
        held_out["mean"],
        0.0,
        _ORIGIN,
        held_out["mean"],
        "0.1",
        "holds" if held_out["mean"] <= 0.1 else "missed",
        note=f"{held_out['cells']} batches, {held_out['folds']} folds; p90 {held_out['p90']:.3f}, worst"
        f" {held_out['worst']:+.3f} ({held_out['worst_cell']})",
    )
    for row in result["rows"]:
        for name, tolerance in _TOLERANCES.items():
            yield relative(
                "CPU1",
                f"{row['plan']} at {row['rate']:g}/s, {name.replace('_', ' ')}, s",
                row["predicted"][name],
                row["measured"][name],
                _ORIGIN,
                tolerance,
            )
    for each in result["winners"]:
        yield Check(
            "CPU2",
            f"the better plan at {each['rate']:g}/s by {each['by'].replace('_', ' ')}",
            each["predicted"],
            each["measured"],
            _ORIGIN,
            None,
            "exact",
            "holds" if each["same"] else "missed",
        )
