"""Searches of large fleets: equal parts first, the others near the best of them; figures of the whole from a part."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace

import pytest

from vllm_suite.cli.plan import add_arguments
from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.report.command import listing, space_of
from vllm_suite.planner.report.question import question
from vllm_suite.planner.search.assess import Task, assess
from vllm_suite.planner.search.candidates import UNEVEN
from vllm_suite.planner.search.case import What
from vllm_suite.planner.search.search import ROUND, Effort, search
from vllm_suite.planner.search.simulated import PART, part, parts
from vllm_suite.planner.search.trial import Trial, Until


def case(*words: str, gpus: str = "128xH100-SXM"):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    base = ["--model", "meta-llama/Llama-3.1-8B", "--gpus", gpus, "--isl", "500", "--osl", "20", "--ttft", "500ms",
            "--tpot", "30ms", "--requests", "200"]  # fmt: skip
    return question(parser.parse_args([*base, *words]))


@pytest.fixture(scope="module")
def large():
    own = case("--space", "kinds=pd", "tp=1,2,4", "pp=1", "seqs=256", "tokens=2048,8192")
    sample = own.sample()
    space = space_of(own)
    return own, space, listing(own, space, sample, None, 1)[0]


def test_fleets_of_no_equal_parts_come_last(large):
    _, _, listed = large
    sizes = [each.plan.gpus // parts(each.plan) for each in listed]
    assert any(size > 2 * PART for size in sizes)
    for each, size in zip(listed, sizes, strict=True):
        assert (each.level == UNEVEN) == (size > 2 * PART)
    levels = [each.level for each in listed]
    assert levels == sorted(levels)
    assert {0, 1, UNEVEN} == set(levels)


def test_where_every_fleet_is_uneven_none_is_left_for_later():
    # 37 engines of one accelerator in two pools have no common divisor.
    own = case("--space", "kinds=pd", "tp=1", "pp=1", "seqs=256", "tokens=8192", gpus="37xH100-SXM")
    listed = listing(own, space_of(own), own.sample(), None, 1)[0]
    assert {parts(each.plan) for each in listed} == {1}
    assert {each.level for each in listed} == {0}


def test_uneven_fleets_are_simulated_with_the_engines_of_the_best_alone(large):
    own, space, listed = large

    uneven = [each for each in listed if each.level == UNEVEN]
    # Not of the shape that is the likeliest by the estimates.
    first = {each.shape for each in listed if each.level == 0} - {uneven[0].shape}
    best = next(each for each in uneven if each.shape in first)

    def holds(plan: Plan, rate: float, until: Until = "end") -> Trial:
        alike = [replace(pool, count=1, ranks=()) for pool in plan.pools] == list(best.shape)
        same = alike and [pool.count for pool in plan.pools] == [pool.count for pool in best.plan.pools]
        return Trial(rate, 1.0, 1.0, 1.0, rate <= (104 if same else 100 if alike else 50))

    effort = Effort(bounds=False, processes=1, refine=1, patience=400)
    found = search(space, listed, holds, own.objective(), effort=effort)
    late = [each for each in found.found if each.candidate.level == UNEVEN]
    assert {each.candidate.shape for each in late} == {best.shape}
    assert found.best is not None
    assert found.best.candidate.plan == best.plan


def test_uneven_fleets_get_a_quarter_of_the_patience(large):
    own, space, listed = large

    def holds(plan: Plan, rate: float, until: Until = "end") -> Trial:
        return Trial(rate, 1.0, 1.0, 1.0, rate <= 100)

    found = search(space, listed, holds, own.objective(), effort=Effort(bounds=False, processes=1, patience=16))
    late = [each for each in found.found if each.candidate.level == UNEVEN]
    # Patience is looked at while a round is put together, so that up to a round more are simulated.
    assert 4 <= len(late) < 4 + ROUND


def test_the_figures_of_a_fleet_are_those_of_its_parts_together():
    own = case(gpus="32xH100-SXM")
    whole = Plan((PoolPlan("any", 32, Parallel()),)).placed()
    piece, rate = part(whole, 320.0)
    assert (piece.gpus, rate) == (16, 160.0)
    sample = own.sample()
    found, one = own.outcome(What(whole, 320.0), sample), own.outcome(What(piece, 160.0), sample)
    assert (found.rate, found.gpus) == (320.0, 32)
    assert found.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    assert found.ttft == one.ttft
    assert found.good == pytest.approx(one.good)
    assert found.pools["any"].utilisation == one.pools["any"].utilisation


def test_who_beats_another_plan_is_looked_for_nearby_first():
    rates: list[float] = []

    def holds(plan: Plan, rate: float, until: Until = "end") -> Trial:
        rates.append(rate)
        return Trial(rate, 1.0, 1.0, 1.0, rate <= 105.0)

    found = assess(Task(Plan((PoolPlan("any", 1),)), start=300.0, floor=100.0), holds)
    assert rates[0] == pytest.approx(102.0)
    assert max(rates) < 110.0
    assert found.goodput is not None
    assert 105.0 / 1.02 <= found.goodput <= 105.0
    rates.clear()
    # Far off it still arrives, in growing steps.
    far = assess(Task(Plan((PoolPlan("any", 1),)), start=300.0, floor=10.0), holds)
    assert math.isclose(far.goodput or 0.0, 105.0, rel_tol=0.02)
    assert len(rates) < 16
