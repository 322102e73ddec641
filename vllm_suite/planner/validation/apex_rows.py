"""The measured runs of Llama-3.1-70B on 8 x H100, and the traces that they served."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One measured run: milliseconds, and seconds for `latency`."""

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


def rows(data: Path) -> list[Row]:
    """The clean rows of Llama-3.1-70B whose trace is here."""
    found = []
    with (data / "measured" / "vllm_8xH100_llama70b.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["clean"] == "True" and "Llama-3.1-70B" in row["model"] and trace_path(data, row["trace"]).is_file():
                figures = float(row["ttft_ms"]), float(row["tpot_ms"]), float(row["e2e_mean_s"])
                found.append(Row(row["trace"], row["plan"], *figures))
    return found


def trace_path(data: Path, name: str) -> Path:
    """Of the trace that all engines of a run shared."""
    return data / "measured" / "apex_traces" / f"llama_{name}.jsonl"


@lru_cache(maxsize=16)
def trace(path: Path) -> tuple[tuple[float, int, int], ...]:
    """Seconds from the start, tokens of prompt and of output, in order of arrival."""
    asked = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    found = [(each["StartTimeOffset"] * 1e-9, each["ContextTokens"], max(1, each["GeneratedTokens"])) for each in asked]
    return tuple(sorted(found))
