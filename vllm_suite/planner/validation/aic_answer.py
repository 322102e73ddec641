"""AIConfigurator's printed answers: the case, its choice between one pool and two, and the rows of both."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PoolPlan


@dataclass(frozen=True)
class Choice:
    """One row of its answer: per-GPU tokens/s, milliseconds, and the engines as (count, tp, batch)."""

    tokens: float
    ttft: float
    tpot: float
    engines: tuple[tuple[int, int, int], ...]

    @property
    def plan(self) -> Plan:
        """As the planner has it."""
        if len(self.engines) == 1:
            count, tp, _ = self.engines[0]
            return Plan((PoolPlan("any", count, Parallel(tp=tp)),))
        (prefill, wide, _), (decode, narrow, _) = self.engines
        return Plan(
            (
                PoolPlan("prefill", prefill, Parallel(tp=wide)),
                PoolPlan("decode", decode, Parallel(tp=narrow), max_num_seqs=512),
            )
        )


@dataclass(frozen=True)
class Answer:
    """Of one case: the workload, its targets in ms, and the rows of both kinds, best first."""

    isl: int
    osl: int
    ttft: float
    tpot: float
    winner: str
    rows: Mapping[str, tuple[Choice, ...]]


def read(path: Path) -> Answer:
    """AIConfigurator's printed answer. Raises ValueError for a file that is none."""
    text = path.read_text(encoding="utf-8")
    asked = re.search(r"ISL=(\d+), OSL=(\d+), TTFT=([\d.]+)ms, TPOT=([\d.]+)ms", text)
    chosen = re.search(r"Best Experiment Chosen: (\w+) at", text)
    if asked is None or chosen is None:
        raise ValueError(f"{path}: not an answer of `aiconfigurator cli default`")
    rows: dict[str, tuple[Choice, ...]] = {}
    for kind in ("agg", "disagg"):
        found, at = [], text.find(f"\n{kind} Top Configurations")
        lines = text[at:].split("\n\n")[0].splitlines() if at >= 0 else []
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        for cells in table[1:]:
            row = dict(zip(table[0], cells, strict=True))
            found.append(_choice(row))
        rows[kind] = tuple(found)
    isl, osl, ttft, tpot = asked.groups()
    return Answer(int(isl), int(osl), float(ttft), float(tpot), chosen[1], rows)


def _choice(row: Mapping[str, str]) -> Choice:
    def tp(cell: str) -> int:
        return int(re.sub(r"\D.*", "", cell.removeprefix("tp")))

    replicas, engines = int(row["replicas"]), []
    if "bs" in row:
        engines.append((replicas, tp(row["parallel"]), int(row["bs"])))
    else:
        for side in ("(p)", "(d)"):
            count = replicas * int(row[f"{side}workers"])
            engines.append((count, tp(row[f"{side}parallel"]), int(row[f"{side}bs"])))
    tpot = 1000.0 / float(row["tokens/s/user"])
    return Choice(float(row["tokens/s/gpu"]), float(row["TTFT"]), tpot, tuple(engines))
