"""`--placement high|low`: DistServe's algorithms on the question's own space, with simulations replaced by formulas."""

from __future__ import annotations

import argparse
import math

import pytest

from vllm_suite.cli.plan import add_arguments
from vllm_suite.planner.plan import Plan, PlanError, PoolPlan
from vllm_suite.planner.report.command import listing, space_of
from vllm_suite.planner.report.question import question
from vllm_suite.planner.search import placement
from vllm_suite.planner.search.assess import MOST_RATE, Task, assess
from vllm_suite.planner.search.horizon import Horizon
from vllm_suite.planner.search.trial import Trial


def listed(monkeypatch, algorithm: str, *words: str, slo=("--ttft", "500ms", "--tpot", "30ms")):
    """Candidates, and what was simulated: targets, and whose time was taken away."""
    asked = []

    def goodput(self, shape, slo, instant=None):
        prefill, decode = shape
        asked.append((slo.ttft is not None, slo.tpot is not None, instant))
        rates = {"decode": 10 * prefill.parallel.tp**0.9, "prefill": 4 * decode.parallel.tp**0.9}
        return rates[instant] if instant else min(rates.values())

    monkeypatch.setattr(placement._Single, "goodput", goodput)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = ["--model", "meta-llama/Llama-3.1-8B", "--gpus", "8xH100-SXM", "--isl", "500", "--osl", "20", "--space",
            "pp=1", "seqs=256", "tokens=8192", "--requests", "200"]  # fmt: skip
    case = question(parser.parse_args([*base, *slo, *words]))
    return listing(case, space_of(case), case.sample(), algorithm, 1)[0], asked


def test_high_counts_each_kind_for_the_rate_alone(monkeypatch):
    (chosen, *others), asked = listed(monkeypatch, "high", "--rate", "20")
    # 10 and 4 requests/s of an engine of one accelerator, which do most per accelerator.
    assert chosen.plan.name == "2 prefill | 5 decode"
    # Prefill is judged by TTFT with a decode that takes no time, decode by both with
    # such a prefill, since its queue is in the TTFT.
    assert set(asked) == {(True, False, "decode"), (True, True, "prefill")}
    assert chosen.fixed
    assert len({rank for pool in chosen.plan.pools for rank in pool.ranks}) == 7
    assert others
    assert {each.kind for each in others} == {"any"}


def test_low_repeats_a_pair_that_shares_a_node(monkeypatch):
    (chosen, *_), asked = listed(monkeypatch, "low", "--rate", "14")
    # One and two accelerators: 7.46 requests/s of three; any other pair has less per accelerator.
    assert chosen.plan.name == "2 prefill | 2 decode tp2"
    assert set(asked) == {(True, True, None)}
    ranks = [rank for pool in chosen.plan.pools for first in pool.ranks for rank in
             range(first, first + pool.parallel.gpus)]  # fmt: skip
    assert sorted(set(ranks)) == sorted(ranks)
    assert len(ranks) == 6


@pytest.mark.parametrize(("algorithm", "name"), [("high", "2 prefill | 5 decode"), ("low", "2 prefill | 2 decode tp2")])
def test_without_a_rate_it_is_the_highest_that_fits(monkeypatch, algorithm, name):
    (chosen, *_), _ = listed(monkeypatch, algorithm)
    assert chosen.plan.name == name


@pytest.mark.parametrize("algorithm", ["high", "low"])
def test_a_rate_that_needs_more_than_there_is_is_refused(monkeypatch, algorithm):
    with pytest.raises(PlanError, match=rf"placement {algorithm}: .* accelerators where it stands, there are 8"):
        listed(monkeypatch, algorithm, "--rate", "100")


def test_high_needs_both_targets(monkeypatch):
    with pytest.raises(PlanError, match="need both targets"):
        listed(monkeypatch, "high", slo=("--ttft", "500ms"))


def test_a_simulation_is_finite_at_any_rate():
    horizon = Horizon(200, 2.0)
    assert (horizon.count(1.0), horizon.count(100.0), horizon.count(math.inf)) == (200, 1000, horizon.most)


def test_a_plan_that_misses_nothing_is_not_asked_for_ever():
    asked = []

    def evaluate(plan, rate, until):
        asked.append(rate)
        return Trial(rate, 1.0, 0.9, 1.0, True)

    found = assess(Task(Plan((PoolPlan("any", 1),))), evaluate)
    assert max(asked) <= MOST_RATE
    assert found.goodput == max(asked)
