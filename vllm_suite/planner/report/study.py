"""What is said of a search's best plan: beside the best colocated one, its bottleneck, what if, and the error bar."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from vllm_suite.planner.outcome import Outcome
from vllm_suite.planner.plan import Plan, PlanError, Role
from vllm_suite.planner.search.assess import Assessed, Task, assess
from vllm_suite.planner.search.case import Case, What
from vllm_suite.planner.search.objective import pareto
from vllm_suite.planner.search.search import Found, SearchResult
from vllm_suite.planner.search.workers import OutOfTime, Workers
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.workload import Request

RATES = (0.8, 1.2, 2.0)
LENGTHS = ((0.8, 1.0), (1.2, 1.0), (1.0, 0.8), (1.0, 1.2))
BEYOND = 1.1
"""How far above its goodput a plan is looked at for what gives way first."""
WIDEST = 0.9
"""Error bars are cut here: no step takes less than no time."""


@dataclass(frozen=True)
class Compared:
    """A plan with its highest rate, and its figures at the common rate."""

    found: Found
    outcome: Outcome | None


@dataclass
class Study:
    """What `study` found.

    Attributes:
        rate: the common rate: the one that was asked for, where it is held, or 80 % of the best plan's highest.
        edge: rate of the rows of `rates` and `lengths`.
        best, colocated, disaggregated: the best of all and of those kinds; `colocated` has encoders in every engine.
        beyond: the best plan above its highest rate; `faster`: its attainment there with one pool a fifth faster.
        rates, lengths: factors and figures of the best plan at other rates and lengths.
        error: half width of the source's uncertainty; `error_origin`: where that comes from.
        slow, quick: figures with every time that much longer and shorter, and `goodputs` both highest rates.
        front: plans that no other one beats in goodput, latency and energy together.
        outside: what was asked beyond the source's range; None where time ran out before that was looked for.
        cut: simulations that were not made because time ran out.
    """

    rate: float
    edge: float
    best: Compared
    colocated: Compared | None
    disaggregated: Compared | None
    beyond: Outcome | None
    faster: dict[Role, float]
    rates: list[tuple[float, Outcome | None]]
    lengths: list[tuple[float, float, Outcome | None]]
    error: float
    error_origin: str
    slow: Outcome | None
    quick: Outcome | None
    goodputs: tuple[float, float] | None
    front: list[Compared]
    outside: dict[str, Any] | None
    cut: int = 0


def study(
    case: Case,
    result: SearchResult,
    sample: list[Request],
    processes: int | None = None,
    deadline: float | None = None,
) -> Study:
    """Simulate what a report says of the best plan. There has to be one.

    Args:
        deadline: of `time.monotonic`; what is not simulated by then is left out.
    """
    best = result.best
    assert best is not None
    highest = _highest(case, best, sample, deadline)
    # A rate that is asked for and that nothing holds is not simulated: its queues would only grow.
    held = case.rate if case.asked and case.rate and case.rate <= highest else None
    rate, edge = (0.8 * highest, highest) if held is None else (held, held)
    case.sources(best.plan.pools[-1])
    error = case.sources.uncertainty
    colocated, apart = result.best_of("any"), result.best_of("prefill+decode", "encode+any", "encode+prefill+decode")
    finalists = _finalists(result, [each for each in (best, colocated, apart) if each is not None])
    u = min(error.relative, WIDEST)
    plan = best.plan
    roles: list[Role] = [pool.role for pool in plan.pools]
    whats = [What(each.plan, rate, energy=True) for each in finalists]
    whats.append(What(plan, BEYOND * highest))
    whats += [What(plan, BEYOND * highest, faster=role) for role in roles]
    whats += [What(plan, edge * factor) for factor in RATES]
    whats += [What(plan, edge, prompt=prompt, output=output) for prompt, output in LENGTHS]
    whats += [What(plan, rate, scale=1 + u), What(plan, rate, scale=1 - u)]
    tasks: list[_Asked] = [*whats, "outside", 1 + u, 1 - u]
    answers = _answers(_Run(case, sample, best, highest, rate), tasks, processes, deadline)
    cut = len(tasks) - len(answers)
    # What is missing is as if it could not be served, but for the rows of tables, which it leaves out.
    done = [*answers, *[None] * cut]
    low, high = done[-2:]
    goodputs = (low, high) if isinstance(low, float) and isinstance(high, float) else None
    outside = done[len(whats)]
    taken = iter([each if isinstance(each, Outcome) else None for each in done[: len(whats)]])
    rows = len(finalists) + 1 + len(roles)
    compared = [Compared(each, next(taken)) for each in finalists]
    by_plan = {each.found.plan: each for each in compared}
    return Study(
        rate=rate,
        edge=edge,
        best=by_plan[plan],
        colocated=None if colocated is None else by_plan[colocated.plan],
        disaggregated=None if apart is None else by_plan[apart.plan],
        beyond=next(taken),
        faster={role: outcome.attainment for role in roles if (outcome := next(taken)) is not None},
        rates=[(factor, next(taken)) for factor in RATES][: max(0, len(answers) - rows)],
        lengths=[(prompt, output, next(taken)) for prompt, output in LENGTHS][
            : max(0, len(answers) - rows - len(RATES))
        ],
        error=error.relative,
        error_origin=error.origin,
        slow=next(taken),
        quick=next(taken),
        goodputs=goodputs,
        front=_front(compared, case.slo.attainment),
        outside=outside if isinstance(outside, dict) else None,
        cut=cut,
    )


Answer = Outcome | dict[str, Any] | float | None
_Asked = What | float | Literal["highest", "outside"]


def _answers(run: _Run, tasks: Sequence[_Asked], processes: int | None, deadline: float | None) -> list[Answer]:
    """Of the tasks, in their order, as many as there is time for."""
    done: list[Answer] = []
    workers: Workers[_Asked, Answer]
    with Workers(run, processes, deadline) as workers:
        try:
            for answer in workers.map(tasks):
                done.append(answer)
        except OutOfTime:
            workers.stop()
    return done


def _finalists(result: SearchResult, needed: Sequence[Found]) -> list[Found]:
    """The best few, the best of each kind, and those that are quickest at no load."""
    ranked = result.ranked()
    quick = sorted(ranked, key=lambda each: each.candidate.bound.latency)[:2]
    return list({each.plan: each for each in (*needed, *ranked[:3], *quick)}.values())


def _front(compared: Sequence[Compared], share: float) -> list[Compared]:
    within = [each for each in compared if each.outcome is not None and each.outcome.attainment >= share]

    def values(each: Compared) -> tuple[float, ...]:
        outcome = each.outcome
        if outcome is None:
            return (each.found.goodput, math.nan, math.nan)
        joules = math.nan if outcome.joules_per_token is None else outcome.joules_per_token
        return (each.found.goodput, -outcome.latency.mean, -joules)

    return pareto(within, values)


def _outside(case: Case, plan: Plan, rate: float, sample: list[Request]) -> dict[str, Any]:
    """Of one simulation with sources of its own, so that neither bounds nor other plans are in it."""
    sources = case.sources.scaled(1.0)
    encode = case.setting.encode_seconds and sources.encode
    own = replace(case, sources=sources, setting=replace(case.setting, source=sources, encode_seconds=encode))
    for pool in plan.pools:
        if pool.role != "encode":
            # Sources may share what they count with others of the same kind; nothing before this run is of interest.
            sources(pool).outside.counts.clear()
            sources(pool).outside.furthest.clear()
    own.outcome(What(plan, rate), sample)
    return sources.outside()


@dataclass(frozen=True)
class _Run:
    """What a worker does: a simulation; for a factor of the source's times the highest rate; or one of the others."""

    case: Case
    sample: list[Request]
    best: Found
    highest: float
    rate: float

    def __call__(self, task: _Asked) -> Answer:
        if isinstance(task, What):
            try:
                return self.case.outcome(task, self.sample)
            except (PlanError, SimulationError):
                return None
        if isinstance(task, str):
            if task == "highest":
                return _goodput(self.case, self.best, self.sample)
            return _outside(self.case, self.best.plan, self.rate, self.sample)
        _, _, evaluate = self.case.varied(What(self.best.plan, 0.0, scale=task), self.sample)
        found = assess(Task(self.best.plan, start=self.highest / task), evaluate)
        return found.goodput or 0.0


def _highest(case: Case, best: Found, sample: list[Request], deadline: float | None) -> float:
    """The best plan's highest rate; what it is known to hold where there is no time to look for it."""
    if not math.isnan(best.goodput):
        return best.goodput
    found = _answers(_Run(case, sample, best, 0.0, 0.0), ["highest"], 1, deadline)
    return found[0] if found and isinstance(found[0], float) else case.rate or 1.0


def _goodput(case: Case, found: Found, sample: list[Request]) -> float:
    assessed: Assessed = assess(Task(found.plan, start=case.rate or 1.0), case.evaluate(sample))
    return assessed.goodput or case.rate or 1.0


def plan_json(plan: Plan, case: Case) -> dict[str, Any]:
    """A plan for files."""
    pools = []
    for pool in plan.pools:
        cut = pool.parallel
        entry: dict[str, Any] = {
            "role": pool.role, "engines": pool.count, "tp": cut.tp, "pp": cut.pp, "dp": cut.dp, "ep": cut.ep,
            "ranks": list(pool.ranks),
        }  # fmt: skip
        if pool.role != "encode":
            encoder = pool.role in ("any", "prefill") and case.setting.encodes(plan, pool)
            limits = case.setting.limits(pool, encoder=encoder)
            quant = pool.quant or case.quant
            entry |= {
                "max_num_seqs": pool.max_num_seqs, "max_num_batched_tokens": pool.max_num_batched_tokens,
                "kv_cache_tokens": limits.blocks * limits.block_size, "weights": quant.weights, "kv": quant.kv,
                "late_kv_only": pool.late_kv_only,
            }  # fmt: skip
        pools.append(entry)
    return {"name": plan.name, "gpus": plan.gpus, "pools": pools}


def as_json(found: Study, case: Case) -> dict[str, Any]:
    """For `plan.json`."""

    def outcome(each: Outcome | None) -> Any:
        return None if each is None else each.as_json()

    def compared(each: Compared | None) -> Any:
        if each is None:
            return None
        goodput = None if math.isnan(each.found.goodput) else each.found.goodput
        per_gpu = None if goodput is None else goodput / case.cluster.gpus
        return {"plan": plan_json(each.found.plan, case), "goodput": goodput, "goodput_per_gpu": per_gpu,
                "at_rate": outcome(each.outcome)}  # fmt: skip

    return {
        "rate": found.rate, "edge": found.edge,
        "best": compared(found.best), "colocated": compared(found.colocated),
        "disaggregated": compared(found.disaggregated),
        "beyond": {"outcome": outcome(found.beyond), "attainment_with_pool_a_fifth_faster": found.faster},
        "rates": [{"factor": factor, "outcome": outcome(each)} for factor, each in found.rates],
        "lengths": [{"prompt": p, "output": o, "outcome": outcome(each)} for p, o, each in found.lengths],
        "error": {"relative": found.error, "origin": found.error_origin, "goodput": found.goodputs,
                  "slow": outcome(found.slow), "quick": outcome(found.quick)},
        "outside": found.outside,
        "front": [compared(each) for each in found.front],
    }  # fmt: skip
