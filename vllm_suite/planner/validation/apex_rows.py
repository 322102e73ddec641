"""Measured runs of vLLM 0.6.0 on 8 x H100, how their engines were started, and the traces that they served."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Served:
    """A model of these runs.

    Attributes:
        name: a part of its name in the rows.
        model: its name in the planner's table.
        formats: of weights and cache, by the planner's names; None for the checkpoint's.
        prefix: of its traces.
        whole_prompts: ``--max-model-len`` of the engines on two GPUs, which is also all that their cache held.
    """

    name: str
    model: str
    formats: tuple[str, str] | None
    prefix: str
    whole_prompts: int


SERVED = (
    Served("Llama-3.1-70B", "meta-llama/Llama-3.1-70B", None, "llama", 24_272),
    Served("Mistral-Large", "mistralai/Mistral-Large-Instruct-2407", ("fp8", "fp8"), "mistral", 20_560),
)
"""What the published scripts started (microsoft/apex_plus, vllm/*.sh)."""


@dataclass(frozen=True)
class Row:
    """One measured run: milliseconds, and seconds for `latency`."""

    served: Served
    trace: str
    plan: str
    ttft: float
    tpot: float
    latency: float

    @property
    def engines(self) -> int:
        """That shared the trace."""
        found = re.match(r"(\d+)DP", self.plan)
        return int(found[1]) if found else 1

    @property
    def tp(self) -> int:
        """GPUs of each."""
        found = re.search(r"(\d+)TP", self.plan)
        if found is None:
            raise ValueError(f"plan {self.plan!r}: a name like 2DP4TP_0 is expected")
        return int(found[1])

    @property
    def engine(self) -> int:
        """Which of them this is."""
        found = re.search(r"_(\d+)$", self.plan)
        return int(found[1]) if found else 0

    @property
    def kind(self) -> str:
        """``8TP``, ``2DP4TP`` and so on."""
        return self.plan.split("_")[0]

    def requests(self, data: Path) -> tuple[tuple[float, int, int], ...] | None:
        """What this engine served: its own trace, or its share of the one that all engines had; None for neither."""
        folder = data / "measured" / "apex_traces"
        own = folder / f"{self.served.prefix}_{self.trace}_{self.plan}.jsonl"
        if self.engines > 1 and own.is_file():
            return trace(own)
        shared = folder / f"{self.served.prefix}_{self.trace}.jsonl"
        return trace(shared)[self.engine :: self.engines] if shared.is_file() else None


@dataclass(frozen=True)
class Rows:
    """What a folder holds: rows that can be compared, and of the other clean ones how many are left out for what."""

    found: tuple[Row, ...]
    left_out: dict[str, int]


def rows(data: Path) -> Rows:
    """Every clean row of ``measured/vllm_8xH100_*.csv``."""
    found, left_out = list[Row](), Counter[str]()
    for path in sorted((data / "measured").glob("vllm_8xH100_*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["clean"] != "True":
                    continue
                served = next((each for each in SERVED if each.name in row["model"]), None)
                if served is None or row["engine"] != "vllm-0.6.0":
                    left_out[f"{row['engine']}, {row['model']}: not a case of this module"] += 1
                    continue
                figures = float(row["ttft_ms"]), float(row["tpot_ms"]), float(row["e2e_mean_s"])
                made = Row(served, row["trace"], row["plan"], *figures)
                if made.requests(data) is None:
                    left_out[f"no trace {served.prefix}_{made.trace}.jsonl"] += 1
                else:
                    found.append(made)
    return Rows(tuple(found), dict(left_out))


@lru_cache(maxsize=16)
def trace(path: Path) -> tuple[tuple[float, int, int], ...]:
    """Seconds from the start, tokens of prompt and of output, in order of arrival."""
    asked = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = [(each["StartTimeOffset"] * 1e-9, each["ContextTokens"], max(1, each["GeneratedTokens"])) for each in asked]
    return tuple(sorted(found))
