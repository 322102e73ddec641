"""The search: what it leaves out could not win, what it finds does not depend on processes, and it can be stopped."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from dataclasses import dataclass, replace

import pytest

from vllm_suite.planner.hardware import cluster
from vllm_suite.planner.models import load
from vllm_suite.planner.plan import Plan, PlanError, Slo
from vllm_suite.planner.search.assess import Task, assess
from vllm_suite.planner.search.baseline import random_plans
from vllm_suite.planner.search.bounds import Bounds
from vllm_suite.planner.search.candidates import Candidate, candidates
from vllm_suite.planner.search.choices import Choices, Settings
from vllm_suite.planner.search.horizon import Horizon
from vllm_suite.planner.search.objective import Objective, pareto
from vllm_suite.planner.search.sampled import sampled
from vllm_suite.planner.search.search import Effort, SearchResult, search
from vllm_suite.planner.search.simulated import Simulated, interval
from vllm_suite.planner.search.sources import Sources, source_maker
from vllm_suite.planner.search.space import Space, room
from vllm_suite.planner.search.state import State, StateError, digest
from vllm_suite.planner.search.trial import Evaluate, Trial, Until
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.traces import Workload, synthetic

ALL = Effort(bounds=False, challenge=False, patience=None, refine=None, processes=1)
PRUNED = Effort(patience=None, refine=None, processes=1)


class Question:
    """A small search: everything that `search` needs."""

    def __init__(
        self,
        workload: Workload,
        slo: Slo,
        name: str = "meta-llama/Llama-3.1-8B",
        gpus: str = "2xH100-SXM",
        least: int = 300,
        **choices: object,
    ) -> None:
        model, quant = load(name)
        hardware = cluster(gpus)
        sources = Sources(source_maker("roofline", hardware), model, quant, hardware)
        self.setting = Setting(model, quant, hardware, sources, sources.encode if workload.items else None)
        fits = room(lambda pool, encoder: self.setting.limits(pool, encoder=encoder).blocks * 16, 8000, 9000)
        self.space = Space(model, hardware, Choices(**choices), fits, bool(workload.items))
        sample = list(workload.requests(1.0, 500))
        horizon = Horizon.of(slo, workload.mean_output - 1, 1.0, least)
        self.bounds = Bounds(self.setting, sample, slo, horizon)
        self.listed = candidates(self.space, self.bounds)
        self.evaluate = Simulated(self.setting, workload, slo, horizon)
        self.objective = Objective("goodput", hardware)


@dataclass(frozen=True)
class Formula:
    """A plan holds a share of its bound that depends on its name alone."""

    bounds: Bounds
    seed: int = 0

    def highest(self, plan: Plan) -> float:
        bare = Plan(tuple(replace(pool, ranks=()) for pool in plan.pools))
        settings = [(pool.max_num_seqs, pool.max_num_batched_tokens) for pool in plan.pools]
        share = random.Random(f"{self.seed} {plan.name} {settings}").uniform(0.3, 1.0)
        return share * self.bounds.plan(bare).rate

    def of(self, candidate: Candidate) -> float:
        return self.highest(candidate.plan)

    def __call__(self, plan: Plan, rate: float, until: Until = "end") -> Trial:
        met = rate <= self.highest(plan)
        return Trial(rate, 0.95 if met else 0.5, 0.9, 1.0, met, latency=1 / self.highest(plan))


@pytest.fixture(scope="module")
def eight() -> Question:
    slo = Slo(0.3, 0.03)
    return Question(synthetic(500, 200, cv=0.5), slo, gpus="8xH100-SXM")


def best_by_formula(question: Question, formula: Formula) -> float:
    return max(formula.highest(each.plan) for each in question.listed)


@pytest.mark.parametrize("seed", range(4))
def test_pruning_keeps_the_optimum_of_formulas(eight, seed):
    formula = Formula(eight.bounds, seed)
    found = search(eight.space, eight.listed, formula, eight.objective, effort=PRUNED)
    assert found.best is not None
    assert found.best.goodput >= best_by_formula(eight, formula) / (1 + PRUNED.step) ** 2
    assert found.left == 0
    assert found.bounded + found.simulated == found.space == len(eight.listed)
    assert found.bounded > 50
    # A plan that does not win costs one run.
    losers = [each for each in found.found if each.value == -math.inf]
    assert losers
    assert all(len(each.assessed.trials) <= 1 for each in losers)


WORKLOADS = {
    "chat": (synthetic(300, 120, cv=0.8), Slo(0.2, 0.02)),
    "long prompts": (synthetic(3000, 30, cv=0.3), Slo(0.5, 0.05)),
    "heavy tails": (synthetic(200, 150, cv=1.5, longest=8000), Slo(0.1, 0.015)),
    "ttft alone": (synthetic(800, 60), Slo(0.15, None)),
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_pruning_keeps_the_optimum_of_an_exhaustive_run_of_the_simulator(name):
    workload, slo = WORKLOADS[name]
    question = Question(workload, slo, any=(Settings(256, 8192), Settings(256, 1024)), pp=(1,),
                        prefill=(Settings(256, 8192),), decode=(Settings(256, 8192),))  # fmt: skip
    every = search(question.space, question.listed, question.evaluate, question.objective, effort=ALL)
    pruned = search(question.space, question.listed, question.evaluate, question.objective, effort=PRUNED)
    assert every.best is not None
    assert pruned.best is not None
    assert pruned.best.goodput >= every.best.goodput / (1 + ALL.step) ** 2
    assert pruned.trials < every.trials
    # And no plan serves more than its bound says.
    for each in every.found:
        assert each.goodput <= each.candidate.bound.rate


def test_no_request_is_quicker_than_its_bound():
    workload, slo = synthetic(700, 40, cv=1.0, longest=6000), Slo(1.0, 0.05)
    question = Question(workload, slo, least=100)
    for candidate in question.listed[:12]:
        plan = candidate.placed(question.space)
        assert plan is not None
        trial = question.evaluate(plan, 0.5)
        assert trial.latency >= candidate.bound.latency * 0.97
        assert trial.ttft >= candidate.bound.ttft * 0.9


def test_the_result_does_not_depend_on_the_number_of_processes(eight):
    # Late ones are the best, so that who is best changes from round to round.
    rising = sorted(eight.listed, key=Formula(eight.bounds).of)
    for seed in range(2):
        formula = Formula(eight.bounds, seed)
        alone = search(eight.space, rising, formula, eight.objective, effort=PRUNED)
        three = search(eight.space, rising, formula, eight.objective, effort=replace(PRUNED, processes=3))
        assert answers(alone) == answers(three)
        assert len({each.assessed.below for each in alone.found}) > 10


def answers(result: SearchResult) -> list[object]:
    return [(each.plan, each.assessed.as_json()) for each in result.found]


@dataclass
class Counting:
    """An evaluation that counts, and may stop everything after so many runs."""

    inner: Formula
    stop: int = 1_000_000
    calls: int = 0

    def __call__(self, plan: Plan, rate: float, until: Until = "end") -> Trial:
        self.calls += 1
        if self.calls > self.stop:
            raise KeyboardInterrupt
        return self.inner(plan, rate, until)


def test_a_search_that_was_interrupted_gives_its_best_and_goes_on_where_it_was(eight, tmp_path):
    formula, path = Formula(eight.bounds), tmp_path / "state.jsonl"
    whole = Counting(formula)
    expected = search(eight.space, eight.listed, whole, eight.objective, effort=PRUNED)
    with State(path, "this") as state:
        part = search(
            eight.space, eight.listed, Counting(formula, stop=60), eight.objective, effort=PRUNED, state=state
        )
    assert part.stopped == "interrupted"
    assert part.best is not None
    assert part.left > 0
    with State(path, "this") as state:
        again = Counting(formula)
        resumed = search(eight.space, eight.listed, again, eight.objective, effort=PRUNED, state=state)
    assert answers(resumed) == answers(expected)
    # What was being done at the interrupt is done again, what was finished is not.
    assert whole.calls - 60 <= again.calls < whole.calls


def test_time_that_is_over_ends_the_search(eight):
    found = search(eight.space, eight.listed, Formula(eight.bounds), eight.objective, effort=Effort(seconds=0.0))
    assert found.stopped == "0 s are over"
    assert found.best is None
    assert found.left == len(eight.listed)


def test_a_state_file_of_other_inputs_is_refused_and_a_cut_line_is_not(tmp_path):
    path = tmp_path / "state.jsonl"
    with State(path, "one") as state:
        state.add("a", {"x": 1})
        state.add("b", {"x": 2})
    with pytest.raises(StateError, match="of a search with other inputs"):
        State(path, "two")
    path.write_text(path.read_text()[:-8])
    with State(path, "one") as state:
        assert state.known == {"a": {"x": 1}}
    path.write_text("{}\n")
    with pytest.raises(StateError, match="not a state file"):
        State(path, "one")
    assert digest(1) == digest(1) != digest(2)


def test_bisection_ends_within_its_step_below_what_holds():
    plan = load_plan()
    for highest in (0.003, 1.0, 17.3, 5000.0):
        for start in (highest / 40, highest, highest * 40):
            found = assess(Task(plan, start=start), below(highest))
            assert found.goodput <= highest < found.goodput * 1.021
            assert len(found.trials) < 30
    never = assess(Task(plan), lambda plan, rate, until="end": trial(rate, False))
    assert never.goodput == 0
    # A ceiling that holds is the answer; a floor that does not is one run.
    capped = assess(Task(plan, ceiling=10.0), lambda plan, rate, until="end": trial(rate, True))
    assert 10 / 1.02 <= capped.goodput <= 10.0
    lost = assess(Task(plan, floor=5.0, ceiling=10.0), lambda plan, rate, until="end": trial(rate, False))
    assert [each.rate for each in lost.trials] == [5.1]
    assert lost.goodput == 0


def trial(rate: float, met: bool) -> Trial:
    return Trial(rate, 0.9, 0.8, 1.0, met)


def below(highest: float) -> Evaluate:
    return lambda plan, rate, until="end": trial(rate, rate <= highest)


def load_plan() -> Plan:
    from vllm_suite.planner.plan import PoolPlan

    return Plan((PoolPlan("any", 1),))


def test_a_plan_that_cannot_be_run_is_an_answer(eight):
    def fails(plan: Plan, rate: float, until: Until = "end") -> Trial:
        raise PlanError("no room")

    found = search(eight.space, eight.listed[:5], fails, eight.objective, effort=PRUNED)
    assert found.best is None
    assert {each.assessed.error for each in found.found} == {"no room"}


def test_cost_is_the_fewest_accelerators_that_hold_the_rate(eight):
    formula = Formula(eight.bounds)
    question = Question(synthetic(500, 200, cv=0.5), Slo(0.3, 0.03), gpus="8xH100-SXM", idle=True, pp=(1,))
    formula = Formula(question.bounds)
    rate = 0.3 * best_by_formula(question, formula)
    objective = Objective("cost", question.space.cluster, rate, 200)
    found = search(question.space, question.listed, formula, objective, effort=PRUNED)
    fewest = min(each.plan.gpus for each in question.listed if formula.highest(each.plan) >= rate)
    assert found.best is not None
    assert found.best.plan.gpus == fewest < 8
    quickest = search(question.space, question.listed, formula, replace(objective, goal="latency"), effort=PRUNED)
    assert quickest.best is not None
    assert formula.highest(quickest.best.plan) >= rate


def test_patience_leaves_the_unlikely_rest(eight):
    formula = Formula(eight.bounds)
    found, whole = (
        search(eight.space, eight.listed, formula, eight.objective, effort=Effort(patience=patience, processes=1))
        for patience in (4, 10_000)
    )
    assert found.left > 10 > whole.left, (found.left, whole.left, found.simulated, whole.simulated)
    assert found.simulated < whole.simulated < 40
    for each in (found, whole):
        assert each.left + each.bounded + each.simulated == each.space
    # Settings are varied for the best plans alone.
    varied = {each.candidate.group for each in found.found if each.candidate.level == 1}
    assert len(varied) <= 2 * 3


def test_the_front_holds_what_nothing_beats():
    points = [(1, 5), (2, 4), (2, 3), (3, 1), (0, 6), (2, 4), (math.nan, 7), (math.nan, 5)]
    assert pareto(points, lambda point: point) == [(1, 5), (2, 4), (3, 1), (0, 6), points[6]]


def test_a_simulation_that_stops_early_says_what_the_whole_one_says():
    eight = Question(synthetic(500, 50, cv=0.5), Slo(0.2, 0.02), gpus="1xH100-SXM", least=1000)
    plan = eight.listed[0].placed(eight.space)
    assert plan is not None
    goodput = assess(Task(plan, start=50.0), eight.evaluate).goodput
    for rate in (0.5 * goodput, 0.95 * goodput, 1.05 * goodput, 1.5 * goodput):
        whole = eight.evaluate(plan, rate)
        assert whole.whole
        assert whole.met == (whole.attainment >= 0.9) == (rate < goodput)
        for until in ("decided", "failed"):
            assert eight.evaluate(plan, rate, until).met == whole.met
    assert eight.evaluate(plan, 0.5 * goodput, "failed") == eight.evaluate(plan, 0.5 * goodput)
    assert not eight.evaluate(plan, 1.5 * goodput, "failed").whole


def test_the_answer_does_not_depend_on_the_number_of_requests():
    slo = Slo(0.3, 0.03)
    found = []
    for least in (300, 3000):
        question = Question(synthetic(500, 200, cv=0.5), slo, least=least, kinds=("any",), pp=(1,))
        plan = question.listed[0].placed(question.space)
        assert plan is not None
        found.append(assess(Task(plan, start=60.0), question.evaluate).goodput)
    # 300 requests at 90 rate-seconds would be over before the first is: simulations are as long as they need to be.
    assert found[0] == pytest.approx(found[1], rel=0.06)


def test_a_wilson_interval():
    # Newcombe (1998), table I: 15 of 148 is 0.0624 to 0.1605.
    assert interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-4)


def test_trials_survive_a_file():
    whole = Trial(3.0, 0.9, 0.88, 0.92, True, latency=1.5)
    again = Trial.from_json(json.loads(json.dumps(whole.as_json())))
    assert again.latency == 1.5
    assert math.isnan(again.energy)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_simulator_gives_the_same_in_two_processes():
    question = Question(synthetic(300, 50), Slo(0.3, 0.03), any=(Settings(256, 8192),), pp=(1,), kinds=("any",))
    runs = [search(question.space, question.listed, question.evaluate, question.objective, effort=Effort(processes=n))
            for n in (1, 2)]  # fmt: skip
    assert [(each.plan, each.goodput) for each in runs[0].found] == [
        (each.plan, each.goodput) for each in runs[1].found
    ]


def test_sampling_finds_a_good_plan_the_same_way_twice(eight):
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    formula = Formula(eight.bounds)
    one, two = (sampled(eight.space, eight.listed, formula, eight.objective, trials=30, seed=1) for _ in range(2))
    assert answers(one) == answers(two)
    assert one.best is not None
    assert one.best.goodput > 0.7 * best_by_formula(eight, formula)
    assert one.left == one.space - len(one.found)


def test_sampling_without_optuna_says_what_to_install(eight, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(PlanError, match=r"pip install 'vllm-suite\[search\]'"):
        sampled(eight.space, eight.listed, Formula(eight.bounds), eight.objective)


def test_random_plans_are_the_same_for_a_seed_and_within_their_step(eight):
    formula = Formula(eight.bounds)
    drawn = random_plans(eight.space, eight.listed, formula, seed=3)
    assert drawn == random_plans(eight.space, eight.listed, formula, seed=3)
    assert drawn != random_plans(eight.space, eight.listed, formula, seed=4)
    assert len(drawn.plans) == 10
    assert drawn.mean == pytest.approx(sum(drawn.goodputs) / 10)
    assert 0 < max(drawn.goodputs) <= best_by_formula(eight, formula)
