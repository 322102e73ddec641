"""C1: AIConfigurator's choices between one pool and two, and its latencies, beside our simulator on the same tables.

AIConfigurator knows no arrivals: it costs one shape of request at a concurrency. Its one pool is compared as a closed
loop, each engine with as many requests as its batch, all from the start, a new one for each that completes. Its two
pools are costed apart: the prefill engine alone with one batch of prompts, the decode engine alone with its own, each
times its corrections; so they are here. Who wins is asked twice: by its own rules on these step times, and of the fleet
simulator with evenly spaced requests, at the highest rate that keeps both targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import Model, Parallel, Quantization, load
from vllm_suite.planner.plan import Plan, PlanError
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
from vllm_suite.planner.validation.aic_answer import Answer, Choice, read
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

PREFILL_RATE, DECODE_RATE = 0.9, 0.92
"""What is left of their rates where it matches both pools."""

_ROUNDS = 8
_ORIGIN = "AIConfigurator 0.12.0, vLLM 0.24.0 tables"


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


def one_pool(source: LatencySource, batch: int, answer: Answer, layers: int) -> tuple[float, float]:
    """TTFT and TPOT in ms of an engine of one pool with so many requests, its host time included."""
    ttft, tpot = closed_loop(source, batch, answer.isl, answer.osl)
    return ttft + DISPATCH_US * 1e-3 * layers, tpot


def two_pools(prefill: LatencySource, decode: LatencySource, choice: Choice, answer: Answer) -> tuple[float, float]:
    """TTFT and TPOT in ms of both engines, with its corrections."""
    ttft, tpot = alone(prefill, decode, choice, answer.isl, answer.osl)
    return ttft * PREFILL * QUEUE, tpot * DECODE


def by_its_rules(choice: Choice, source: Callable[[int], LatencySource], answer: Answer, layers: int) -> float:
    """Output tokens a second and GPU of a row as it costs one; 0 outside the targets.

    One pool gives what a closed loop gives. Two pools give the lower of both pools' rates, each less its share.
    """
    if len(choice.engines) == 1:
        ((count, tp, batch),) = choice.engines
        ttft, tpot = one_pool(source(tp), batch, answer, layers)
        rate = count * batch * 1e3 / (ttft + (answer.osl - 1) * tpot)
    else:
        (prefills, wide, prompts), (decodes, narrow, sequences) = choice.engines
        ttft, tpot = two_pools(source(wide), source(narrow), choice, answer)
        rate = min(
            PREFILL_RATE * prefills * prompts * QUEUE * 1e3 / ttft,
            DECODE_RATE * decodes * sequences * 1e3 / (tpot * answer.osl),
        )
    return rate * answer.osl / choice.plan.gpus if ttft <= answer.ttft and tpot <= answer.tpot else 0.0


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
    layers = len(model.layers)
    if answer.winner == "agg":
        _, tp, batch = best.engines[0]
        ttft, tpot = one_pool(source(tp), batch, answer, layers)
        note = f"closed loop, with its own host time of {DISPATCH_US * 1e-3 * layers:.0f} ms a request"
    else:
        ttft, tpot = two_pools(source(best.engines[0][1]), source(best.engines[1][1]), best, answer)
        note = f"by its own rule: bare times {PREFILL} x {QUEUE} and {DECODE}"
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
    theirs = {kind: rows[0].tokens for kind, rows in answer.rows.items()}
    rules = {
        kind: max((by_its_rules(row, source, answer, layers), row.plan.name) for row in rows)
        for kind, rows in answer.rows.items()
    }
    note = f"its rules on these step times: a closed loop; prefill's rate times {PREFILL_RATE}, decode's {DECODE_RATE}"
    yield _winner(f"one pool or two by its own rules, {what}", rules, theirs, answer, note)
    fleets = {
        kind: max((capacity(row.plan, setting, answer), row.plan.name) for row in rows)
        for kind, rows in answer.rows.items()
    }
    note = "simulated with evenly spaced requests, where two pools need neither its factors nor idle prefill engines"
    yield _winner(f"one pool or two, simulated, {what}", fleets, theirs, answer, note)


def _winner(
    what: str, ours: Mapping[str, tuple[float, str]], theirs: Mapping[str, float], answer: Answer, note: str
) -> Check:
    winner = max(ours, key=lambda kind: ours[kind])
    text = "; ".join(f"{kind} {ours[kind][0]:.0f} ({ours[kind][1]}), it says {theirs[kind]:.0f}" for kind in ours)
    verdict: Verdict = "holds" if winner == answer.winner else "missed"
    note = f"output tokens/s and GPU within {answer.ttft:g}/{answer.tpot:g} ms: {text}; among its own rows; {note}"
    return Check("C1", what, winner, answer.winner, _ORIGIN, None, "exact", verdict, note=note)
