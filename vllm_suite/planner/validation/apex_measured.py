"""A2 to A4: models on 8 x H100 as vLLM 0.6.0 served them, beside our simulator on AIConfigurator's kernel times.

How the engines were started is in the published scripts (microsoft/apex_plus, vllm/*.sh), and what follows from it in
vLLM 0.6's defaults:

- tensor parallelism of 4 and 8: the model's whole length of 131,072 tokens, above 32 K, for which vLLM 0.6 turned
  chunked prompts on, 512 tokens a step; its own all-reduce, launched alone in steps with prompts, which ran outside
  CUDA graphs;
- of 2: a ``--max-model-len`` below that (`Served`), so whole prompts, and ``--disable-custom-all-reduce``, so NCCL.

Version 0.6 without chunks runs prompts before decode and never both in one step; here both share a step, which is the
one rule that differs. Two constants are fitted, on the lmsys rows of Llama-3.1-70B
alone; nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Model, Parallel, Quantization, load
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.pool import simulate
from vllm_suite.planner.sources.aic import AicSource
from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import LatencySource, SourceError
from vllm_suite.planner.sources.roofline import RooflineSource
from vllm_suite.planner.validation.apex_rows import SERVED, Row, Served, rows
from vllm_suite.planner.validation.check import Check, Verdict, not_run

STEP_US, REQUEST_US = 4331.0, 9832.0
"""Host time of a step and of a request, fitted to mean TPOT and TTFT of Llama's clean lmsys rows (`fit`)."""

FITTED_ON = "lmsys"
_ORIGIN = "vLLM 0.6.0 on 8 x H100, logs of microsoft/apex_plus"
_NOTE = (
    f"{STEP_US / 1000:.2f} ms a step and {REQUEST_US / 1000:.2f} ms a request, fitted on the clean lmsys rows of Llama;"
    " tables of vLLM 0.24, engine 0.6.0"
)
_DEALT = "creation on several engines was served from an older trace, of which only the one for 8TP is here"


@dataclass(frozen=True)
class Predicted:
    """The same of a simulated run."""

    row: Row
    ttft: float
    tpot: float
    latency: float


Sources = Callable[[Served, int], LatencySource]
"""The source of a model's engine on so many GPUs."""


def _loaded(served: Served) -> tuple[Model, Quantization]:
    model, stored = load(served.model)
    return model, stored if served.formats is None else Quantization(weights=served.formats[0], kv=served.formats[1])


def aic_sources(step_us: float) -> Sources:
    """From AIConfigurator's tables. Raises SourceError where they are not installed."""
    tables = AicTables.of("H100-SXM")

    @lru_cache(maxsize=8)
    def source(served: Served, tp: int) -> LatencySource:
        (model, quant), shape, most = _loaded(served), Parallel(tp=tp), served.whole_prompts
        if tp == 2:
            return AicSource(model, quant, shape, tables, step_us=step_us, all_reduce="nccl", max_tokens=most)
        return AicSource(model, quant, shape, tables, step_us=step_us, prompt_all_reduce="eager", max_tokens=1024)

    return source


def roofline_sources() -> Sources:
    """The roofline with its default constants."""
    machine = cluster("8xH100-SXM")

    @lru_cache(maxsize=8)
    def source(served: Served, tp: int) -> LatencySource:
        model, quant = _loaded(served)
        return RooflineSource(model, quant, Parallel(tp=tp), machine, max_tokens=served.whole_prompts)

    return source


def predict(data: Path, measured: Sequence[Row], sources: Sources) -> list[Predicted]:
    """Simulate the share of each row's engine; TTFT without the time of a request outside its steps."""
    found = []
    for row in measured:
        jobs = [Job(number, *each) for number, each in enumerate(row.requests(data) or ())]
        whole, most = row.tp == 2, row.served.whole_prompts
        # Four and eight GPUs have room for 200,000 tokens and more: the cache never fills.
        limits = Limits(
            blocks=most // 16 if whole else 12_000,
            max_num_batched_tokens=most if whole else 512,
        )
        done: list[Job] = []
        simulate(jobs, sources(row.served, row.tp), limits, lambda job, now, done=done: done.append(job))  # type: ignore[misc]
        # vLLM's counters: gaps over all tokens, the first included.
        gaps = sum(job.last_token - job.first_token for job in done) / sum(job.output for job in done)
        ttft, latency = np.mean([job.ttft for job in done]), np.mean([job.last_token - job.arrival for job in done])
        found.append(Predicted(row, float(ttft) * 1e3, gaps * 1e3, float(latency)))
    return found


def fitted(row: Row) -> bool:
    """Whether the constants were fitted on it."""
    return row.served is SERVED[0] and row.trace.startswith(FITTED_ON)


def fit(data: Path) -> tuple[float, float]:
    """The two constants in microseconds, from the lmsys rows: what is left of mean TPOT, and then of mean TTFT."""
    measured = [row for row in rows(data).found if fitted(row)]
    bare = predict(data, measured, aic_sources(0.0))
    step = float(np.mean([each.row.tpot - each.tpot for each in bare])) * 1e3
    stepped = predict(data, measured, aic_sources(step))
    return step, float(np.mean([each.row.ttft - each.ttft for each in stepped])) * 1e3


def errors(predicted: Sequence[Predicted], request_us: float) -> tuple[float, float]:
    """Mean absolute relative errors of TPOT and of TTFT."""
    tpot = np.mean([abs(each.tpot / each.row.tpot - 1) for each in predicted])
    ttft = np.mean([abs((each.ttft + request_us * 1e-3) / each.row.ttft - 1) for each in predicted])
    return float(tpot), float(ttft)


def checks(data: Path) -> Iterator[Check]:
    """A2, A3 and A4 for each model that was measured; not run where tables or measurements are absent."""
    measured, what = rows(data), "measured vLLM 0.6.0 on 8 x H100"
    try:
        sources = aic_sources(STEP_US)
        why = "" if measured.found else f"no measured/vllm_8xH100_*.csv with clean rows and their traces in {data}"
    except SourceError as error:
        why = str(error)
    if why:
        for id in ("A2", "A3", "A4"):
            yield not_run(id, what, why, _ORIGIN)
        return
    for served in SERVED:
        predicted = predict(data, [row for row in measured.found if row.served is served], sources)
        others = [each for each in predicted if not fitted(each.row)]
        if others:
            same = [each.row for each in others]
            ours = {
                "our roofline, nothing fitted": errors(predict(data, same, roofline_sources()), 0.0),
                "our aic, nothing fitted": errors(predict(data, same, aic_sources(0.0)), 0.0),
            }
            yield from _means(served, others, ours)
        yield from _ranking(served, predicted)
    for reason, count in measured.left_out.items():
        yield not_run("A2", f"{count} clean rows", reason, _ORIGIN)


def _means(served: Served, others: Sequence[Predicted], plain: Mapping[str, tuple[float, float]]) -> Iterator[Check]:
    # Published for Llama alone.
    known: dict[str, tuple[float, float | None]] = (
        {}
        if served is not SERVED[0]
        else {
            "APEX": (0.066, 0.276),
            "AIConfigurator": (0.248, 0.736),
            "AIConfigurator + 4.67 ms": (0.049, None),
        }
    )
    single = {
        "A2": {_where(each): each.tpot / each.row.tpot - 1 for each in others},
        "A3": {_where(each): (each.ttft + REQUEST_US * 1e-3) / each.row.ttft - 1 for each in others},
    }
    for id, name, error, limit, at in zip(
        ("A2", "A3"), ("TPOT", "TTFT"), errors(others, REQUEST_US), (0.06, 0.15), (0, 1), strict=True
    ):
        told = {
            tool: round(found, 4)
            for tool, figures in (known | dict(plain)).items()
            if (found := figures[at]) is not None
        }
        rows_off = ", ".join(f"{where} {off:+.1%}" for where, off in single[id].items())
        yield Check(
            id,
            f"{name}: mean error of the {len(others)} clean rows of {served.name} that nothing was fitted on",
            round(error, 4),
            0.0,
            _ORIGIN,
            error,
            f"{limit:g}",
            "holds" if error <= limit else "missed",
            told,
            f"{_NOTE}; {_DEALT}; rows: {rows_off}",
        )


def _where(each: Predicted) -> str:
    return f"{each.row.trace} {each.row.plan}"


def _ranking(served: Served, predicted: Sequence[Predicted]) -> Iterator[Check]:
    for name in sorted({each.row.trace for each in predicted}):
        if not name.startswith(("lmsys", "summarization")):
            continue
        ours, measured = {}, {}
        for kind in ("8TP", "2DP4TP", "4DP2TP"):
            runs = [each for each in predicted if each.row.trace == name and each.row.kind == kind]
            if runs:
                ours[kind] = float(np.mean([each.latency + REQUEST_US * 1e-6 for each in runs]))
                measured[kind] = float(np.mean([each.row.latency for each in runs]))
        if len(ours) < 2:
            continue
        order, real = (" < ".join(sorted(found, key=lambda kind: found[kind])) for found in (ours, measured))
        seconds = ", ".join(f"{kind} {ours[kind]:.2f}/{measured[kind]:.2f}" for kind in ours)
        apex = {"APEX by busy time": "4DP2TP < 2DP4TP < 8TP"} if served is SERVED[0] and name == "lmsys_05" else {}
        verdict: Verdict = "holds" if order == real else "missed"
        note = f"mean latency, ours/measured, s: {seconds}"
        yield Check(
            "A4", f"order of plans, {served.name}, {name}", order, real, _ORIGIN, None, "exact", verdict, apex, note
        )
