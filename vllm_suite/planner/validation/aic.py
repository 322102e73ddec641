"""C1: AIConfigurator's choices between one pool and two, and its latencies, beside our simulator on the same tables.

AIConfigurator knows no arrivals: it costs one shape of request at a concurrency. Its one pool is compared as a closed
loop, each engine with as many requests as its batch, all from the start, a new one for each that completes. Its two
pools are costed apart: the prefill engine alone with one batch of prompts, the decode engine alone with its own, each
times its corrections; so they are here. Who wins is decided by the fleet simulator with evenly spaced requests, at the
highest rate that keeps both targets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Model, Parallel, Quantization, load
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.jobs import Job
from vllm_suite.planner.simulator.served import Served
from vllm_suite.planner.simulator.setting import Serving, Setting
from vllm_suite.planner.sources.aic import AicSource
from vllm_suite.planner.sources.aic_tables import AicTables
from vllm_suite.planner.sources.base import LatencySource, SourceError
from vllm_suite.planner.sources.steps import Steps
from vllm_suite.planner.validation.check import Check, Verdict, not_run, relative
from vllm_suite.planner.workload import Request

CASES = {
    "qwen3-32b_h200_vllm_8g.txt": "Qwen/Qwen3-32B",
    "llama3.1-70b_h200_vllm_8g.txt": "meta-llama/Llama-3.1-70B",
    "llama3.1-8b_h200_vllm_8g.txt": "meta-llama/Llama-3.1-8B",
}
DISPATCH_US = 800.0
"""Host time of a request by layer that AIConfigurator adds to vLLM's first tokens (its vLLM backend, 0.12.0)."""

PREFILL, QUEUE, DECODE = 1.1, 1.8, 1.08
"""What it multiplies the times of engines of two pools by: prefill, waiting for it, decode."""

_ROUNDS = 8
_ORIGIN = "AIConfigurator 0.12.0, vLLM 0.24.0 tables"


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


def closed_loop(source: LatencySource, batch: int, isl: int, osl: int, apart_s: float = 0.0) -> tuple[float, float]:
    """Mean TTFT and TPOT in ms of one engine that always holds `batch` requests of one shape.

    Args:
        apart_s: seconds between the first `batch` requests; a benchmark at a concurrency starts them at once.
    """
    clock, done, started = Clock(), list[Job](), batch

    def finished(job: Job, now: float) -> None:
        nonlocal started
        done.append(job)
        if started < _ROUNDS * batch:
            started += 1
            engine.accept(Job(started, now, isl, osl), now)

    engine = Engine(clock, source, Limits(blocks=batch * (isl + osl) // 16 + batch + 1), finished)
    clock.feed((Job(number, number * apart_s, isl, osl) for number in range(batch)), engine.accept)
    clock.run()
    # The first two rounds and the last are left out.
    kept = [job for job in done if 2 * batch <= job.number < (_ROUNDS - 1) * batch]
    return float(np.mean([job.ttft for job in kept])) * 1e3, float(np.mean([job.tpot for job in kept])) * 1e3


def alone(prefill: LatencySource, decode: LatencySource, choice: Choice, isl: int, osl: int) -> tuple[float, float]:
    """TTFT and TPOT in ms of a prefill engine with one batch of prompts and a decode engine with its own, bare."""
    prompts, sequences = choice.engines[0][2], choice.engines[1][2]
    first = prefill.step_seconds(Steps.of(chunks=[(isl, 0)] * prompts))
    steps = np.arange(1, osl)
    rows = Steps(decode_sequences=np.full(osl - 1, sequences), decode_context=sequences * (isl + steps))
    return first * 1e3, float(decode.seconds(rows).mean()) * 1e3


def capacity(plan: Plan, setting: Setting, answer: Answer) -> float:
    """Output tokens a second and GPU at the highest rate of evenly spaced requests with both means in their targets."""

    def holds(rate: float) -> bool:
        done: list[Served] = []
        # As long as eight requests take one after the other: the first two and the last are left out.
        count = int(rate * 8 * (answer.ttft + answer.tpot * answer.osl) * 1e-3) + 50
        requests = (Request(number, number / rate, answer.isl, answer.osl) for number in range(count))
        simulate_plan(plan, setting, requests, done.append)
        kept = [each for each in done if count * 0.25 <= each.number < count * 0.875]
        ttft, tpot = np.mean([each.ttft for each in kept]), np.mean([each.tpot for each in kept])
        return bool(ttft * 1e3 <= answer.ttft and tpot * 1e3 <= answer.tpot)

    low, high = 0.0, 1.0
    try:
        while holds(high) and high < 1e4:
            low, high = high, high * 2
    except PlanError:
        return 0.0
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low * answer.osl / plan.gpus


def checks(data: Path) -> Iterator[Check]:
    """C1 for three models on 8 x H200."""
    for file, name in CASES.items():
        path = data / "measured" / "aiconfigurator" / file
        what = f"{name} on 8 x H200"
        if not path.is_file():
            yield not_run("C1", what, f"no {path.name} in {path.parent}", _ORIGIN)
            continue
        try:
            tables = AicTables.of("H200")
        except SourceError as error:
            yield not_run("C1", what, str(error), _ORIGIN)
            continue
        model, quant = load(name)
        yield from _case(what, read(path), model, quant, tables)


def _case(what: str, answer: Answer, model: Model, quant: Quantization, tables: AicTables) -> Iterator[Check]:
    @lru_cache(maxsize=16)
    def source(tp: int) -> LatencySource:
        return AicSource(model, quant, Parallel(tp=tp), tables, max_tokens=8192)

    best = answer.rows[answer.winner][0]
    name = f"{what}, {answer.isl}/{answer.osl}, {best.plan.name}"
    if answer.winner == "agg":
        _, tp, batch = best.engines[0]
        ttft, tpot = closed_loop(source(tp), batch, answer.isl, answer.osl)
        host = DISPATCH_US * 1e-3 * len(model.layers)
        note = f"closed loop {ttft:.0f} ms, and its own host time of {host:.0f} ms a request"
        ttft += host
    else:
        ttft, tpot = alone(source(best.engines[0][1]), source(best.engines[1][1]), best, answer.isl, answer.osl)
        note = f"bare {ttft:.0f} and {tpot:.1f} ms, by its own rule times {PREFILL} x {QUEUE} and {DECODE}"
        ttft, tpot = ttft * PREFILL * QUEUE, tpot * DECODE
    yield relative("C1", f"TTFT, ms, {name}", ttft, best.ttft, _ORIGIN, 0.15, note=note)
    yield relative("C1", f"TPOT, ms, {name}", tpot, best.tpot, _ORIGIN, 0.15, note=note)
    setting = Setting(
        model,
        quant,
        cluster("8xH200"),
        lambda pool: source(pool.parallel.tp),
        prefix_caching=False,
        serving=Serving(streams="prefill"),
    )
    ours = {
        kind: max((capacity(row.plan, setting, answer), row.plan.name) for row in rows)
        for kind, rows in answer.rows.items()
    }
    winner = max(ours, key=lambda kind: ours[kind])
    theirs = {kind: rows[0].tokens for kind, rows in answer.rows.items()}
    text = "; ".join(f"{kind} {ours[kind][0]:.0f} ({ours[kind][1]}), it says {theirs[kind]:.0f}" for kind in ours)
    verdict: Verdict = "holds" if winner == answer.winner else "missed"
    note = f"output tokens/s and GPU within {answer.ttft:g}/{answer.tpot:g} ms: {text}; among its own rows"
    yield Check("C1", f"one pool or two, {what}", winner, answer.winner, _ORIGIN, None, "exact", verdict, note=note)
