"""Sampling a space with Optuna, where bounds leave too many plans to simulate them all."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vllm_suite.planner.plan import PlanError
from vllm_suite.planner.search.assess import Assessed, Task, assess
from vllm_suite.planner.search.candidates import Candidate
from vllm_suite.planner.search.objective import Objective
from vllm_suite.planner.search.search import Effort, Found, Progress, SearchResult
from vllm_suite.planner.search.space import Space
from vllm_suite.planner.search.trial import Evaluate

TRIALS = 100


def sampled(
    space: Space,
    listed: Sequence[Candidate],
    evaluate: Evaluate,
    objective: Objective,
    *,
    effort: Effort | None = None,
    seed: int = 0,
    trials: int = TRIALS,
    progress: Progress | None = None,
) -> SearchResult:
    """The best of so many plans that a tree-structured Parzen estimator proposes; in one process.

    A plan is what its numbers are: pools, engines of each, sizes, settings. The likely best of each kind, by its
    estimate, is looked at first.

    Raises:
        PlanError: Optuna is not installed.
    """
    try:
        optuna: Any = import_module("optuna")
    except ModuleNotFoundError as error:
        raise PlanError("--method optuna needs Optuna: pip install 'vllm-suite[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    effort = effort or Effort()
    result = SearchResult(objective, space=len(listed))
    table = {_numbers(each): each for each in reversed(listed)}
    names = sorted({name for key in table for name, _ in key})
    known = {name: sorted({dict(key).get(name, 0) for key in table}) for name in names}
    tried: dict[tuple[tuple[str, int], ...], Found] = {}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True))
    for kind in space.kinds:
        first = next((each for each in listed if each.kind == kind), None)
        if first is not None:
            study.enqueue_trial({name: dict(_numbers(first)).get(name, 0) for name in names})
    deadline = math.inf if effort.seconds is None else time.monotonic() + effort.seconds
    best = -math.inf
    while len(study.trials) < trials + len(space.kinds):
        if time.monotonic() > deadline:
            result.stopped = f"{effort.seconds:g} s are over"
            break
        trial = study.ask()
        asked = {name: int(trial.suggest_categorical(name, known[name])) for name in names}
        # The nearest plan that there is: in as many numbers as possible the same.
        key = min(table, key=lambda each: (sum(dict(each).get(name, 0) != asked[name] for name in names), each))
        if key not in tried:
            tried[key] = _assessed(space, table[key], evaluate, objective, best, effort, result)
        best = max(best, tried[key].value)
        study.tell(trial, max(0.0, tried[key].value) if objective.goal == "goodput" else max(-1e9, tried[key].value))
        if progress is not None:
            progress(len(study.trials), trials + len(space.kinds), max(tried.values(), key=lambda each: each.value))
    result.found = sorted(tried.values(), key=lambda each: (-each.value, each.candidate.bound.latency))
    result.left = result.space - len(tried)
    return result


def _numbers(candidate: Candidate) -> tuple[tuple[str, int], ...]:
    found: dict[str, int] = {}
    for pool in candidate.plan.pools:
        cut = pool.parallel
        found |= {
            f"{pool.role} engines": pool.count, f"{pool.role} tp": cut.tp, f"{pool.role} pp": cut.pp,
            f"{pool.role} dp": cut.dp, f"{pool.role} ep": int(cut.ep), f"{pool.role} seqs": pool.max_num_seqs,
            f"{pool.role} tokens": pool.max_num_batched_tokens, f"{pool.role} format": _number(pool.quant),
        }  # fmt: skip
    return tuple(sorted(found.items()))


def _number(value: object) -> int:
    return 0 if value is None else sum(ord(letter) * (index + 1) for index, letter in enumerate(repr(value)))


def _assessed(
    space: Space,
    candidate: Candidate,
    evaluate: Evaluate,
    objective: Objective,
    best: float,
    effort: Effort,
    result: SearchResult,
) -> Found:
    plan = candidate.placed(space)
    if plan is None or objective.most(candidate.plan, candidate.bound) == -math.inf:
        result.bounded += 1
        return Found(candidate, plan or candidate.plan.placed(), Assessed(0.0), -math.inf)
    floor = best * space.cluster.gpus if objective.goal == "goodput" and best > 0 else 0.0
    rate = objective.rate if objective.at_rate else None
    task = Task(plan, candidate.bound.estimate or 1.0, floor, candidate.bound.rate, effort.step, rate)
    assessed = assess(task, evaluate)
    result.simulated += 1
    result.trials += len(assessed.trials)
    trial = assessed.trials[0] if objective.at_rate and assessed.trials else None
    return Found(candidate, plan, assessed, objective.value(plan, assessed.goodput, trial), trial)
