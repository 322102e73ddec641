"""The search: every plan is bounded, the likely best are simulated first, and a plan that cannot win is not simulated.

Plans go to the workers in rounds of a fixed number, each judged against the best of the rounds before. So the result
depends neither on the number of processes nor on which of them is faster.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from vllm_suite.planner.plan import Plan
from vllm_suite.planner.search.assess import Assessed, Task, assess
from vllm_suite.planner.search.candidates import UNEVEN, Candidate, Group
from vllm_suite.planner.search.choices import Kind
from vllm_suite.planner.search.objective import Objective
from vllm_suite.planner.search.space import Shape, Space
from vllm_suite.planner.search.state import State, digest
from vllm_suite.planner.search.trial import Evaluate, Trial
from vllm_suite.planner.search.workers import OutOfTime, Workers

ROUND = 8
"""Plans that are simulated between two looks at who is best. A constant: the result depends on it."""

SLACK = 1.02
"""By how much a bound has to be above the best before its plan is worth simulating: the bisection's own width."""


@dataclass(frozen=True)
class Found:
    """A plan that was simulated.

    Attributes:
        value: of the objective, larger is better; -inf where it misses the targets.
        at_rate: its trial at the common rate at which plans are compared; None where it was not made.
    """

    candidate: Candidate
    plan: Plan
    assessed: Assessed
    value: float
    at_rate: Trial | None = None

    @property
    def goodput(self) -> float:
        """Requests per second; nan where it was not looked for."""
        return math.nan if self.assessed.goodput is None else self.assessed.goodput


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        found: simulated plans, best first; those that were given up have the value -inf and come last.
        space: plans that there are, `bounded`: how many the bounds ruled out, `simulated`: how many were simulated,
            `trials`: simulations.
        left: plans that were not looked at, because time ran out or because none of many others was better.
        note: what a reader is to know of the list of plans.
        stopped: why it ended before all was looked at; None where it was.
    """

    objective: Objective
    found: list[Found] = field(default_factory=list)
    space: int = 0
    bounded: int = 0
    simulated: int = 0
    trials: int = 0
    left: int = 0
    note: str = ""
    stopped: str | None = None

    @property
    def best(self) -> Found | None:
        """The best plan that meets the targets."""
        return self.found[0] if self.found and self.found[0].value > -math.inf else None

    def best_of(self, *kinds: Kind) -> Found | None:
        """The best of some kinds that meets the targets."""
        return next((each for each in self.found if each.candidate.kind in kinds and each.value > -math.inf), None)

    def ranked(self) -> list[Found]:
        """Those that meet the targets, best first."""
        return [each for each in self.found if each.value > -math.inf]


@dataclass(frozen=True)
class Effort:
    """How much is looked at.

    Attributes:
        step: relative width that a goodput is found to.
        bounds: leave out plans whose bound says that they cannot win; without it every plan is simulated.
        challenge: give up a plan that does not hold the best one's rate.
        patience: plans in a row, of one kind and level, that do not win before the rest of them is left; None: all.
            Large fleets of no equal parts, which take very much longer, get a quarter of it.
        refine: of each kind the settings and numbers of so many of the best plans are varied; None: of all plans.
        processes: None for one per core.
        seconds: None for no limit.
    """

    step: float = 0.02
    bounds: bool = True
    challenge: bool = True
    patience: int | None = 16
    refine: int | None = 3
    processes: int | None = None
    seconds: float | None = None


Progress = Callable[[int, int, "Found | None"], None]
"""Called after every round: plans that are decided, all plans, the best so far."""


def search(
    space: Space,
    listed: Sequence[Candidate],
    evaluate: Evaluate,
    objective: Objective,
    *,
    effort: Effort | None = None,
    state: State | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The best plans of a list, of each kind apart: so the best colocated plan is known beside the best of all.

    A deadline or an interrupt ends it with what was found so far.

    Args:
        listed: of `candidates`, in the order in which they are tried.
        objective: for one at a rate, its `rate` is set.
    """
    effort = effort or Effort()
    state = state or State(None, "")
    result = SearchResult(objective, space=len(listed))
    deadline = None if effort.seconds is None else time.monotonic() + effort.seconds
    with Workers(_Run(evaluate), effort.processes, deadline) as workers:
        run = _Search(space, objective, effort, state, workers, result)
        try:
            run.all(listed, progress)
        except (OutOfTime, KeyboardInterrupt) as stop:
            result.stopped = "interrupted" if isinstance(stop, KeyboardInterrupt) else f"{effort.seconds:g} s are over"
            result.left = result.space - run.decided
            workers.stop()
    result.found.sort(key=lambda each: (-each.value, each.candidate.bound.latency))
    return result


@dataclass(frozen=True)
class _Run:
    """What a worker does."""

    evaluate: Evaluate

    def __call__(self, task: Task) -> Assessed:
        return assess(task, self.evaluate)


@dataclass
class _Search:
    """A search under way."""

    space: Space
    objective: Objective
    effort: Effort
    state: State
    workers: Workers[Task, Assessed]
    result: SearchResult
    best: dict[Kind, Found] = field(default_factory=dict)
    decided: int = 0
    failed: dict[tuple[Kind, int], int] = field(default_factory=dict)
    chosen: dict[Kind, set[Group]] = field(default_factory=dict)
    shapes: dict[Kind, set[Shape]] = field(default_factory=dict)

    def all(self, listed: Sequence[Candidate], progress: Progress | None) -> None:
        """Round after round."""
        waiting, size = iter(listed), 2
        while True:
            # Small rounds first: while nobody is best, every plan is measured to the end.
            chosen = list(islice(self._worth(waiting), size))
            size = min(ROUND, 2 * size)
            for candidate, plan, assessed in self._simulated(chosen):
                self._note(candidate, plan, assessed)
            if progress is not None:
                best = max(self.best.values(), key=lambda each: each.value, default=None)
                progress(self.decided, len(listed), best)
            if not chosen:
                return

    def _worth(self, waiting: Iterator[Candidate]) -> Iterator[Candidate]:
        """Those that might win."""
        for candidate in waiting:
            key = (candidate.kind, candidate.level)
            patience = self.effort.patience
            if patience is not None and candidate.level == UNEVEN:
                patience = max(1, patience // 4)
            tired = patience is not None and self.failed.get(key, 0) >= patience
            if self.effort.bounds and not self._may_win(candidate):
                self.result.bounded += 1
                self.decided += 1
            elif tired or (candidate.level and not self._refined(candidate)):
                self.result.left += 1
                self.decided += 1
            else:
                yield candidate

    def _may_win(self, candidate: Candidate) -> bool:
        most = self.objective.most(candidate.plan, candidate.bound)
        best = self.best.get(candidate.kind)
        if best is None:
            return most > -math.inf
        return most > best.value * SLACK if best.value > 0 else most > best.value

    def _refined(self, candidate: Candidate) -> bool:
        """Whether it varies the settings of one of the best plans, or its numbers of engines. Those of the levels
        before are all decided by then.
        """
        if self.effort.refine is None:
            return True
        kind = candidate.kind
        if candidate.level == UNEVEN:
            if kind not in self.shapes:
                self.shapes[kind] = {each.candidate.shape for each in self._leaders(kind)}
            return candidate.shape in self.shapes[kind]
        if kind not in self.chosen:
            self.chosen[kind] = {each.candidate.group for each in self._leaders(kind)}
        return candidate.group in self.chosen[kind]

    def _leaders(self, kind: Kind) -> list[Found]:
        own = [each for each in self.result.found if each.candidate.kind == kind]
        own.sort(key=lambda each: (-each.value, -each.candidate.bound.estimate))
        return own[: self.effort.refine]

    def _simulated(self, chosen: Sequence[Candidate]) -> Iterator[tuple[Candidate, Plan, Assessed]]:
        placed = [(each, plan) for each in chosen if (plan := each.placed(self.space)) is not None]
        self.decided += len(chosen) - len(placed)
        self.result.bounded += len(chosen) - len(placed)
        tasks = [self._task(candidate, plan) for candidate, plan in placed]
        keys = [digest(task) for task in tasks]
        new = [task for task, key in zip(tasks, keys, strict=True) if key not in self.state.known]
        answers = self.workers.map(new)
        for (candidate, plan), key in zip(placed, keys, strict=True):
            if key in self.state.known:
                assessed = Assessed.from_json(self.state.known[key])
            else:
                assessed = next(answers)
                self.state.add(key, assessed.as_json())
            yield candidate, plan, assessed

    def _task(self, candidate: Candidate, plan: Plan) -> Task:
        if self.objective.at_rate:
            return Task(plan, rate=self.objective.rate)
        best = self.best.get(candidate.kind)
        # Without bounds, infinite ones: a plan is simulated up to where it fails.
        ceiling = candidate.bound.rate if self.effort.bounds and candidate.bound.rate > 0 else math.inf
        return Task(
            plan,
            start=candidate.bound.estimate or 1.0,
            floor=best.goodput if best is not None and self.effort.challenge else 0.0,
            ceiling=ceiling,
            step=self.effort.step,
        )

    def _note(self, candidate: Candidate, plan: Plan, assessed: Assessed) -> None:
        result, objective = self.result, self.objective
        trial = assessed.trials[0] if objective.at_rate and assessed.trials else None
        value = objective.value(plan, assessed.goodput, trial)
        found = Found(candidate, plan, assessed, value, trial)
        result.found.append(found)
        result.simulated += 1
        result.trials += len(assessed.trials)
        self.decided += 1
        key = (candidate.kind, candidate.level)
        best = self.best.get(candidate.kind)
        if value > (-math.inf if best is None else best.value):
            self.best[candidate.kind] = found
            self.failed[key] = 0
        else:
            self.failed[key] = self.failed.get(key, 0) + 1


def compared(found: Sequence[Found], evaluate: Evaluate, rate: float, state: State, workers: int | None) -> list[Found]:
    """The same with each plan's trial at one common rate, for those that have none."""
    tasks = [Task(each.plan, rate=rate) for each in found]
    keys = [digest(task) for task in tasks]
    with Workers(_Run(evaluate), workers) as pool:
        answers = pool.map([task for task, key in zip(tasks, keys, strict=True) if key not in state.known])
        done = []
        for each, key in zip(found, keys, strict=True):
            if key not in state.known:
                state.add(key, next(answers).as_json())
            trials = Assessed.from_json(state.known[key]).trials
            done.append(replace(each, at_rate=trials[0] if trials else None))
    return done
