"""When traffic has shifted, what it is now, and whether a change is worth it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from watched import APART, LARGE, SMALL, counted, stretch

from vllm_suite.planner.plan import Plan
from vllm_suite.planner.watch import (
    ShiftTest,
    WatchError,
    Window,
    decide,
    difference,
    workload_of,
)
from vllm_suite.planner.watch.shift import dispersion


@pytest.mark.parametrize("uneven", [0.0, 0.05], ids=["poisson", "uneven"])
def test_false_alarms_are_as_rare_as_promised(uneven: float) -> None:
    draw, level, looks = np.random.default_rng(7), 0.05, 600
    test = ShiftTest(false_alarms=level, rate_floor=0.0, length_floor=0.0)
    alarms = {"rate": 0, "prompts": 0, "outputs": 0}
    either = 0
    for _ in range(looks):
        windows = [stretch(draw, 60.0 * index, uneven=uneven) for index in range(26)]
        found = test.shifts(windows[:20], windows[20:])
        either += bool(found)
        for shift in found:
            alarms[shift.what] += 1
    # Three standard errors above the promise.
    assert either / looks < level + 3 * math.sqrt(level / looks)
    # And the test of the rate is no quieter than it has to be.
    assert alarms["rate"] / looks > level / 3 / 3


def test_floors_leave_no_false_alarm_in_a_week() -> None:
    draw, test = np.random.default_rng(8), ShiftTest()
    windows = [stretch(draw, 60.0 * index) for index in range(7 * 24 * 60 // 5)]
    looks = [test.shifts(windows[:30], windows[at : at + 10]) for at in range(30, len(windows) - 10)]
    assert not any(looks)


@pytest.mark.parametrize(
    ("changes", "what"),
    [({"rate": 7.0}, "rate"), ({"rate": 3.5}, "rate"), ({"longer": 1.5}, "prompts")],
)
def test_shifts_are_found(changes: dict[str, float], what: str) -> None:
    draw = np.random.default_rng(9)
    reference = [stretch(draw, 60.0 * index) for index in range(30)]
    recent = [stretch(draw, 60.0 * index, **changes) for index in range(30, 40)]
    found = ShiftTest().shifts(reference, recent)
    assert [shift.what for shift in found] == [what]
    assert found[0].score > 1
    assert what in str(found[0])


def test_what_is_significant_but_small_is_no_shift() -> None:
    draw = np.random.default_rng(10)
    reference = [stretch(draw, 60.0 * index, rate=500.0) for index in range(30)]
    recent = [stretch(draw, 60.0 * index, rate=540.0, longer=1.1) for index in range(10)]
    assert not ShiftTest().shifts(reference, recent)
    assert len(ShiftTest(rate_floor=0.0, length_floor=0.0).shifts(reference, recent)) == 2


def test_unevenness_is_measured() -> None:
    draw = np.random.default_rng(11)
    even = [stretch(draw, 0.0) for _ in range(200)]
    uneven = [stretch(draw, 0.0, uneven=0.1) for _ in range(200)]
    assert dispersion(even) == pytest.approx(1, abs=0.25)
    # Poisson and a tenth of the mean's square on top.
    assert dispersion(uneven) == pytest.approx(1 + 0.1 * 300, rel=0.3)
    assert dispersion(uneven[:5]) == 1.0


def test_a_workload_of_windows_has_their_rate_and_lengths() -> None:
    draw = np.random.default_rng(12)
    windows = [stretch(draw, 60.0 * index) for index in range(10)]
    workload, whole = workload_of(windows), Window.joined(windows)
    assert workload.rate == whole.requests / 600
    requests = list(workload.requests(limit=20_000))
    prompts = np.array([request.prompt for request in requests])
    assert prompts.mean() == pytest.approx(whole.prompts.mean, rel=0.03)
    assert np.mean([request.output for request in requests]) == pytest.approx(whole.outputs.mean, rel=0.03)
    assert 19_999 / requests[-1].arrival == pytest.approx(workload.rate)
    shares = np.array(whole.prompts.counts) / whole.prompts.count
    drawn = np.array(counted(prompts).counts) / len(prompts)
    # Buckets are a factor of ten wide, and the mean decides where in them lengths lie.
    assert drawn == pytest.approx(shares, abs=0.12)
    with pytest.raises(WatchError, match="no finished requests"):
        workload_of([Window(0, 60, 0, counted(np.array([])), counted(np.array([])))])


def test_differences_are_named_and_counted() -> None:
    assert difference(SMALL, SMALL.placed()).lines == ()
    more = difference(SMALL, LARGE)
    assert (more.lines, more.engines, more.gpus) == (("~ any: count 2 -> 4",), 2, 4)
    apart = difference(SMALL, APART)
    assert apart.lines == ("- 2 any tp2", "+ 1 prefill tp2", "+ 1 decode tp2")
    assert (apart.engines, apart.gpus) == (2, 4)
    tuned = Plan((replace(SMALL.pools[0], max_num_seqs=64),))
    assert difference(SMALL, tuned).lines == ("~ any: max_num_seqs 256 -> 64",)
    assert difference(LARGE, SMALL).engines == 0


def test_a_change_has_to_be_needed_better_and_worth_it() -> None:
    def of(rate: float, old: float, new: float, plan: Plan = APART, **more: float) -> tuple[bool, str]:
        found = decide(SMALL, plan, rate=rate, old_goodput=old, new_goodput=new, **more)  # type: ignore[arg-type]
        return found.change, found.reason

    assert of(10, 8, 14)[0]
    assert of(10, 8, 14, SMALL) == (False, "the plan that is running is still the best one")
    # It holds what comes, however much better the other one is.
    assert not of(10, 11.1, 30)[0]
    # Neither enough, nor better.
    assert not of(10, 8, 8.5)[0]
    # 2 more requests a second for 100 s against 120 s without any.
    changed, reason = of(10, 8, 14, horizon_s=100)
    assert not changed
    assert "200 more" in reason
    # Both GPUs of one role down for a tenth of the time.
    found = decide(
        SMALL, APART, rate=10, old_goodput=8, new_goodput=14, horizon_s=100, roles={"prefill": 1, "decode": 1}
    )
    assert found.change
    assert (found.gained, found.lost) == (200, 8)
