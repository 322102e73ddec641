"""A watch from look to look: when it plans again, what it says, and what it does after a failure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from watched import APART, LARGE, SMALL, stretch

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.traces import Workload
from vllm_suite.planner.watch import (
    Histogram,
    Recorded,
    Settings,
    WatchError,
    WatchSeries,
    Window,
    watch,
)


@dataclass
class Formula:
    """A search by a formula: engines serve 3 requests a second each, of prompts of up to 300 tokens on average."""

    asked: list[Workload] = field(default_factory=list)

    def best(self, workload: Workload) -> Plan | None:
        self.asked.append(workload)
        assert workload.rate is not None
        if workload.mean_prompt > 5000:
            return None
        if workload.mean_prompt > 400:
            return APART
        return Plan((PoolPlan("any", max(1, math.ceil(workload.rate * 1.3 / 3)), Parallel(tp=2)),))

    def goodput(self, plan: Plan, workload: Workload) -> float:
        return 3.0 * plan.gpus / 2 if workload.mean_prompt < 400 or len(plan.pools) > 1 else 1.0


def recorded(path: Path, rates: list[float], seed: int = 13, longer: float = 1.0) -> Recorded:
    draw = np.random.default_rng(seed)
    found = Recorded(path)
    found.write([stretch(draw, 60.0 * index, rate, longer if index > 60 else 1.0) for index, rate in enumerate(rates)])
    return found


def test_steady_traffic_changes_nothing(tmp_path: Path) -> None:
    said, formula = list[str](), Formula()
    plan = watch(recorded(tmp_path / "a.json", [5.0] * 300), SMALL, formula, say=said.append)
    assert (plan, said, formula.asked) == (SMALL, [], [])


def test_a_shift_changes_the_plan_once(tmp_path: Path) -> None:
    said, changed, formula = list[str](), list[Plan](), Formula()
    plan = watch(recorded(tmp_path / "a.json", [5.0] * 60 + [9.0] * 200), SMALL, formula, say=said.append,
                 changed=lambda plan, workload: changed.append(plan))  # fmt: skip
    assert plan == LARGE
    assert changed == [LARGE]
    # Once, for the new traffic and no mixture with the old.
    (asked,) = formula.asked
    assert asked.rate == pytest.approx(9, rel=0.1)
    assert any(line.startswith("at ") and "rate: " in line for line in said)
    assert "  ~ any: count 2 -> 4" in said
    # Back again, the larger fleet holds it: nothing changes.
    plan = watch(recorded(tmp_path / "b.json", [9.0] * 60 + [5.0] * 100), LARGE, Formula(), say=said.append)
    assert plan == LARGE
    assert "keep 4 any tp2: the running plan holds 12" in said[-1]


def test_a_spike_changes_nothing(tmp_path: Path) -> None:
    formula = Formula()
    settings = Settings(confirm=12)
    rates = [5.0] * 60 + [15.0] * 2 + [5.0] * 60
    assert (
        watch(recorded(tmp_path / "a.json", rates), SMALL, formula, settings=settings, say=lambda line: None) == SMALL
    )
    assert not formula.asked
    assert watch(recorded(tmp_path / "a.json", rates), SMALL, formula, say=lambda line: None) != SMALL


def test_only_looks_in_a_row_confirm(tmp_path: Path) -> None:
    formula = Formula()
    source = recorded(tmp_path / "a.json", [5.0] * 60 + [15.0, 5.0, 5.0] * 8)
    watch(source, SMALL, formula, settings=Settings(recent=1, confirm=2), say=lambda line: None)
    assert not formula.asked


def test_no_plan_for_it_is_said(tmp_path: Path) -> None:
    said = list[str]()
    assert watch(recorded(tmp_path / "a.json", [5.0] * 100, longer=50.0), SMALL, Formula(), say=said.append) == SMALL
    assert "  no plan meets the targets for it; the running one stays" in said


def test_too_short_a_recording_is_said(tmp_path: Path) -> None:
    said = list[str]()
    watch(recorded(tmp_path / "a.json", [5.0] * 20), SMALL, Formula(), say=said.append)
    assert said == ["20 windows are fewer than the 40 of a look"]


@dataclass
class Live:
    """A server's windows as time passes; some looks fail."""

    all: list[Window]
    fails: tuple[int, ...] = ()
    step: float = 60.0
    asked: int = 0

    def windows(self, start: float, end: float) -> list[Window]:
        self.asked += 1
        if self.asked in self.fails:
            raise WatchError("no answer within 20 s")
        return [each for each in self.all if start <= each.start and each.start + each.seconds <= end]


def test_a_live_watch_goes_on_after_a_failed_look(tmp_path: Path) -> None:
    draw, said, now = np.random.default_rng(14), list[str](), [2400.0]
    live = Live([stretch(draw, 60.0 * i, 5.0 if i < 60 else 9.0) for i in range(100)], fails=(30,))
    record = tmp_path / "seen.json"

    def sleep(seconds: float) -> None:
        now[0] += seconds

    plan = watch(live, SMALL, Formula(), say=said.append, clock=lambda: now[0], sleep=sleep, looks=60, record=record)
    assert live.asked == 60
    assert plan == LARGE
    assert "look failed, and is tried again: no answer within 20 s" in said
    seen = Recorded(record).windows()
    # Every window once, also those of the failed look.
    assert [window.start for window in seen] == [60.0 * i for i in range(len(seen))]
    assert len(seen) > 90
    with pytest.raises(WatchError):
        watch(Live([], fails=(1,)), SMALL, Formula(), looks=1, clock=lambda: 0.0)


def test_engines_with_other_buckets_begin_a_new_reference() -> None:
    """Those that were started anew with another `max_model_len`: windows of the two cannot be compared."""
    draw, said, changed, now = np.random.default_rng(16), list[str](), list[Plan](), [2400.0]
    live = Live([stretch(draw, 60.0 * i, 5.0 if i < 110 else 9.0) for i in range(160)])
    for i in range(50, 160):
        one = live.all[i]
        finer = Histogram((0.5, *one.outputs.bounds), (0.0, *one.outputs.counts), one.outputs.total)
        live.all[i] = replace(one, outputs=finer)
    registry = CollectorRegistry()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    plan = watch(live, SMALL, Formula(), say=said.append, clock=lambda: now[0], sleep=sleep, looks=120,
                 changed=lambda plan, workload: changed.append(plan), series=WatchSeries(registry))  # fmt: skip
    assert said[0].startswith("at 3000: the engines count lengths in other buckets")
    assert not [line for line in said if "failed" in line]
    assert registry.get_sample_value("vllm_suite_watch_looks_total", {"outcome": "failed"}) == 0
    assert (plan, changed) == (LARGE, [LARGE])


def test_a_long_outage_is_not_asked_for_as_a_whole() -> None:
    """Prometheus refuses more than 11,000 points; a fleet that was off for longer would never be seen again."""
    draw, asked, now = np.random.default_rng(17), list[float](), [2400.0]

    class Off(Live):
        def windows(self, start: float, end: float) -> list[Window]:
            asked.append((end - start) / 60)
            return super().windows(start, end)

    live = Off([stretch(draw, 60.0 * i) for i in (*range(50), *range(20_000, 20_050))])

    def sleep(seconds: float) -> None:
        now[0] += 60.0 if now[0] < 3600 else 60.0 * 9973

    series = CollectorRegistry()
    watch(live, SMALL, Formula(), clock=lambda: now[0], sleep=sleep, looks=30, series=WatchSeries(series))
    assert max(asked) <= 11_000
    assert series.get_sample_value("vllm_suite_watch_looks_total", {"outcome": "ok"}) == 30
