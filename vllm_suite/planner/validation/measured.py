"""L1: real vLLM 0.19 runs that LLMServingSim's authors published with layer times of the same card.

A run is a folder ``<hardware>_<model>/`` with ``requests.jsonl`` (times of each of 300 requests), ``meta.json`` (the
engine's arguments) and ``summary.txt`` (what their own simulator predicted); profiles are in ``perf/``. Arrivals and
lengths are the measured ones, prompts repeat each other as in the workload, step times come from the profile through
`tables`, rules from the simulator. Nothing is fitted here; what was known when the link of two RTX PRO 6000 was written
down stands in that device's file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_suite.planner.hardware import Cluster, HardwareError, cluster
from vllm_suite.planner.hardware.collectives import Collectives
from vllm_suite.planner.models import ModelError, Parallel, Quantization, load, names
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.sources.base import LatencySource, SourceError
from vllm_suite.planner.sources.roofline import RooflineSource
from vllm_suite.planner.sources.tables import TableSource
from vllm_suite.planner.validation import shared_prompts
from vllm_suite.planner.validation.check import Check, not_run, relative
from vllm_suite.planner.workload import Request

DEVICES = {"RTXPRO6000": "RTX-PRO-6000", "RTX4090": "RTX-4090", "H100": "H100-SXM", "A100": "A100-80G", "L40S": "L40S"}
"""LLMServingSim's names of hardware by the planner's."""

TOLERANCES = {"TTFT mean": 0.10, "TTFT p99": 0.10, "TPOT mean": 0.03, "latency mean": 0.10}
"""By quantity; none was set for latency, which is held to that of TTFT."""

_ORIGIN = "vLLM {version}, casys-kaist/LLMServingSim"
_SUMMARY = re.compile(r"^(TTFT|TPOT|Latency) (Mean|P99)\s+([\d.]+)\s+([\d.]+)", re.MULTILINE)


@dataclass(frozen=True)
class Run:
    """A measured run.

    Attributes:
        name: of its folder.
        hardware, model: as LLMServingSim calls them.
        engine: vLLM's arguments.
        rows: of each request, in order of arrival at the engine.
        prefix_caching: vLLM's setting.
        blocks: of the cache, as vLLM counted them; None where it was not written down.
        shared: ids of the blocks that each row's prompt begins with; None where nothing is known of its prompts.
        theirs: relative errors of LLMServingSim itself, by quantity; empty where they were not published.
    """

    name: str
    hardware: str
    model: str
    version: str
    engine: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...]
    theirs: Mapping[str, float]
    prefix_caching: bool = True
    blocks: int | None = None
    shared: shared_prompts.Chains | None = None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises OSError, ValueError or KeyError for a folder of another layout."""
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        lines = (folder / "requests.jsonl").read_text(encoding="utf-8").splitlines()
        rows = sorted((json.loads(line) for line in lines if line.strip()), key=lambda row: float(row["queued_ts"]))
        summary, theirs = folder / "summary.txt", {}
        for kind, which, measured, predicted in _SUMMARY.findall(
            summary.read_text("utf-8") if summary.exists() else ""
        ):
            kind = "latency" if kind == "Latency" else kind
            theirs[f"{kind} {which.lower()}"] = float(predicted) / float(measured) - 1
        engine = meta["engine_kwargs"]
        cache = meta.get("kv_cache") or {}
        # vLLM searches its cache for a prompt's beginning unless told otherwise.
        caching = engine.get("enable_prefix_caching", cache.get("enable_prefix_caching"))
        shared = shared_prompts.of_run(folder.parent, meta, len(rows))
        if shared is not None:
            # Its rows are numbered as the workload's lines.
            shared = tuple(shared[int(str(row["request_id"]).rpartition("-")[2])] for row in rows)
        return cls(
            folder.name,
            folder.name.split("_", 1)[0],
            meta["model"],
            str(meta["vllm_version"]),
            engine,
            tuple(rows),
            theirs,
            prefix_caching=caching is not False,
            blocks=cache.get("num_gpu_blocks"),
            shared=shared,
        )

    @property
    def parallel(self) -> Parallel:
        """How the engine was cut."""
        engine = self.engine
        return Parallel(
            tp=int(engine.get("tensor_parallel_size", 1)),
            dp=int(engine.get("data_parallel_size", 1)),
            ep=bool(engine.get("enable_expert_parallel", False)),
        )

    @property
    def accelerators(self) -> Cluster:
        """What it ran on. Raises HardwareError for a card without a device file."""
        if self.hardware not in DEVICES:
            raise HardwareError(f"no device file for {self.hardware}")
        return cluster(f"{self.parallel.gpus}x{DEVICES[self.hardware]}")

    @property
    def base(self) -> str:
        """The bundled model of the same shapes: the longest name that this one begins with. Raises ModelError."""
        found = [name for name in names() if self.model.startswith(name)]
        if not found:
            raise ModelError(f"no bundled config of {self.model}")
        return max(found, key=len)

    @property
    def quant(self) -> Quantization:
        """Formats of weights and cache. Raises ModelError for one that is not known."""
        engine = self.engine
        return Quantization.named(str(engine.get("dtype", "auto")), kv=str(engine.get("kv_cache_dtype", "auto")))

    def measured(self) -> dict[str, float]:
        """Seconds by quantity."""
        rows = self.rows
        first = np.array([row["first_token_ts"] - row["queued_ts"] for row in rows])
        whole = np.array([row["last_token_ts"] - row["queued_ts"] for row in rows])
        gaps = [(row["last_token_ts"] - row["first_token_ts"]) / (row["output_toks"] - 1) for row in rows
                if row["output_toks"] > 1]  # fmt: skip
        return _quantities(first, np.array(gaps), whole)

    def predicted(self, source: LatencySource) -> dict[str, float]:
        """The same from the simulator."""
        start, served = self.rows[0]["queued_ts"], list[Served]()
        shared = self.shared or ((),) * len(self.rows)
        requests = (
            Request(
                number,
                row["queued_ts"] - start,
                row["input_toks"],
                row["output_toks"],
                prefix=prefix,
                block=shared_prompts.BLOCK,
            )
            for number, (row, prefix) in enumerate(zip(self.rows, shared, strict=True))
        )
        setting = Setting(
            load(self.base).model,
            self.quant,
            self.accelerators,
            lambda pool: source,
            prefix_caching=self.prefix_caching,
        )
        engine = self.engine
        pool = PoolPlan(
            "any",
            1,
            self.parallel,
            max_num_seqs=int(engine["max_num_seqs"]),
            max_num_batched_tokens=int(engine["max_num_batched_tokens"]),
            # One of them stands for no block at all.
            kv_blocks=None if self.blocks is None else self.blocks - 1,
        )
        simulate_plan(Plan((pool,)), setting, requests, served.append)
        return _quantities(
            np.array([each.ttft for each in served]),
            np.array([each.tpot for each in served if each.output > 1]),
            np.array([each.latency for each in served]),
        )

    def tables(self, perf: Path) -> TableSource:
        """Step times from the profile. Raises SourceError where it is not there."""
        # Their names of variants: the type of weights, and that of the cache where it is another.
        variant = {"float16": "fp16", "half": "fp16", "float32": "fp32"}.get(str(self.engine.get("dtype")), "bf16")
        if str(self.engine.get("kv_cache_dtype", "auto")).startswith("fp8"):
            variant += "-kvfp8"
        folder = perf / self.hardware / self.model / variant
        return TableSource(folder, load(self.base).model, self.parallel, collectives=Collectives(self.accelerators))

    def roofline(self) -> RooflineSource:
        """Step times from shapes and rates."""
        return RooflineSource(load(self.base).model, self.quant, self.parallel, self.accelerators)


def _quantities(first: Any, gaps: Any, whole: Any) -> dict[str, float]:
    return {
        "TTFT mean": float(first.mean()),
        "TTFT p99": float(np.percentile(first, 99)),
        "TPOT mean": float(gaps.mean()),
        "latency mean": float(whole.mean()),
    }


def checks(data: Path) -> Iterator[Check]:
    """Every run under ``llmservingsim/`` of the data folder."""
    root = data / "llmservingsim"
    folders = sorted(path.parent for path in root.glob("*/requests.jsonl"))
    if not folders:
        yield not_run("L1", "measured runs of vLLM 0.19", f"no {root}/*/requests.jsonl")
    for folder in folders:
        try:
            run = Run.read(folder)
            source = run.tables(root / "perf")
            ours, shapes = run.predicted(source), run.predicted(run.roofline())
        except (OSError, ValueError, KeyError) as error:
            kind = "" if isinstance(error, (SourceError, ModelError, HardwareError, PlanError, SimulationError)) else (
                f"{type(error).__name__}: ")  # fmt: skip
            yield not_run("L1", folder.name, f"{kind}{error}", _ORIGIN.format(version="0.19"))
            continue
        measured, outside = run.measured(), source.outside.report()
        for what, tolerance in TOLERANCES.items():
            others = {"roofline": shapes[what] / measured[what] - 1}
            if what in run.theirs:
                others["LLMServingSim"] = run.theirs[what]
            beyond = f"beyond the profile: {', '.join(outside)}" if outside else "nothing beyond the profile"
            prompts = "repeat each other as in the workload" if run.shared else "taken as all different"
            note = f"relative errors of the others; {beyond}; prompts {prompts}"
            yield relative("L1", f"{run.name}: {what} (s)", ours[what], measured[what],
                           _ORIGIN.format(version=run.version), tolerance, others=others, note=note)  # fmt: skip
