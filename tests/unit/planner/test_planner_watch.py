"""Replanning: what Prometheus answers, when traffic has shifted, and whether a change is worth it."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from vllm_suite.planner.models import Parallel
from vllm_suite.planner.plan import Plan, PoolPlan
from vllm_suite.planner.traces import Workload
from vllm_suite.planner.watch import (
    Histogram,
    Prometheus,
    Recorded,
    Settings,
    ShiftTest,
    WatchError,
    Window,
    decide,
    difference,
    watch,
    workload_of,
)
from vllm_suite.planner.watch.shift import dispersion

BOUNDS = (1.0, 10.0, 100.0, 1000.0, math.inf)
SMALL = Plan((PoolPlan("any", 2, Parallel(tp=2)),))
LARGE = Plan((PoolPlan("any", 4, Parallel(tp=2)),))
APART = Plan((PoolPlan("prefill", 1, Parallel(tp=2)), PoolPlan("decode", 1, Parallel(tp=2), max_num_seqs=128)))


def counted(lengths: np.ndarray[Any, Any]) -> Histogram:
    place = np.searchsorted(BOUNDS, lengths, side="left")
    return Histogram(BOUNDS, tuple(map(float, np.bincount(place, minlength=len(BOUNDS)))), float(lengths.sum()))


def stretch(
    draw: np.random.Generator, start: float, rate: float = 5.0, longer: float = 1.0, uneven: float = 0.0
) -> Window:
    """A minute of traffic; `uneven` is the variance of its rate over the mean."""
    now = rate * draw.gamma(1 / uneven, uneven) if uneven else rate
    count = int(draw.poisson(60 * now))
    prompts = np.rint(longer * draw.lognormal(5, 1, count)) + 1
    return Window(start, 60.0, count, counted(prompts), counted(np.rint(draw.lognormal(4, 1, count)) + 1))


class Fake:
    """A server that answers as the documentation of Prometheus' HTTP API has it."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answer: Callable[[dict[str, str]], Any] = self.matrix
        self.values: dict[str, list[tuple[dict[str, str], list[str]]]] = {
            "vllm:request_success_total": [({}, ["30", "60"])],
            "vllm:request_prompt_tokens_sum": [({}, ["9000", "18000"])],
            "vllm:request_generation_tokens_sum": [({}, ["600", "NaN"])],
            "vllm:request_prompt_tokens_bucket": [
                # Out of order, as a hash table gives them.
                ({"le": "+Inf"}, ["30", "60"]), ({"le": "100"}, ["10", "15"]), ({"le": "1000.0"}, ["29", "60"]),
            ],
            "vllm:request_generation_tokens_bucket": [({"le": "50"}, ["30", "40"]), ({"le": "+Inf"}, ["30", "60"])],
        }  # fmt: skip

    def matrix(self, asked: dict[str, str]) -> Any:
        name = max((name for name in self.values if name + "{" in asked["query"]), key=len)
        first, step = float(asked["start"]), float(asked["step"])
        rows = [
            {"metric": metric, "values": [[first + index * step, value] for index, value in enumerate(values)]}
            for metric, values in self.values[name]
        ]
        return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": rows}})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        asked = {key: str(value) for key, value in (await request.post()).items()}
        self.asked.append(asked)
        answer = self.answer(asked)
        found: web.StreamResponse = await answer if asyncio.iscoroutine(answer) else answer
        return found


@contextmanager
def served(fake: Fake) -> Iterator[str]:
    ready, box = threading.Event(), dict[str, Any]()

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/api/v1/query_range", fake.handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        assert site._server is not None
        box["port"] = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        ready.set()
        await box["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(20)
    try:
        yield f"http://127.0.0.1:{box['port']}"
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(20)


def test_windows_are_what_prometheus_answers() -> None:
    fake = Fake()
    with served(fake) as url:
        found = Prometheus(url + "/", selector='job="decode"', step=30, lag=5).windows(1000.0, 1066.0)
    one, two = found
    assert (one.start, one.seconds, one.requests, one.rate) == (1000.0, 30.0, 30.0, 1.0)
    assert one.prompts == Histogram((100.0, 1000.0, math.inf), (10.0, 19.0, 1.0), 9000.0)
    assert one.outputs == Histogram((50.0, math.inf), (30.0, 0.0), 600.0)
    assert two.prompts.counts == (15.0, 45.0, 0.0)
    # What Prometheus has no number for counts as nothing.
    assert two.outputs.total == 0.0
    queries = {asked["query"] for asked in fake.asked}
    assert 'sum (increase(vllm:request_success_total{job="decode"}[30s]))' in queries
    assert 'sum by (le) (increase(vllm:request_prompt_tokens_bucket{job="decode"}[30s]))' in queries
    assert {(asked["start"], asked["end"], asked["step"]) for asked in fake.asked} == {("1030.000", "1060.000", "30")}


def test_no_whole_window_asks_nothing() -> None:
    assert Prometheus("http://127.0.0.1:1").windows(1000.0, 1060.0) == []


async def _slow() -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


def _empty(asked: dict[str, str]) -> web.Response:
    return web.json_response({"status": "success", "data": {"resultType": "matrix", "result": []}})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda asked: web.json_response({"status": "error", "errorType": "bad_data", "error": "parse error"},
                                         status=400), "HTTP 400, bad_data: parse error"),
        (lambda asked: web.json_response({"status": "error", "errorType": "timeout", "error": "query timed out"},
                                         status=503), "HTTP 503, timeout"),
        (lambda asked: web.Response(text="<html>no", status=502), "HTTP 502 and no JSON"),
        (lambda asked: web.json_response([1]), "no success"),
        (lambda asked: web.json_response({"status": "success", "data": {"resultType": "vector", "result": []}}),
         "a matrix is expected"),
        (lambda asked: web.json_response({"status": "success", "data": {"resultType": "matrix", "result": [{}]}}),
         "no series of numbers"),
        (_empty, "no series vllm:request_success_total"),
        (lambda asked: _slow(), "no answer within 0.3 s"),
    ],
    ids=["400", "503", "html", "list", "vector", "row", "absent", "slow"],
)  # fmt: skip
def test_error_answers_say_what_is_wrong(answer: Any, reason: str) -> None:
    fake = Fake()
    fake.answer = answer
    with served(fake) as url, pytest.raises(WatchError, match=reason):
        Prometheus(url, step=30, timeout=0.3 if reason.startswith("no answer") else 20.0).windows(0.0, 90.0)


def test_nobody_there_is_an_error() -> None:
    with pytest.raises(WatchError, match="query_range"):
        Prometheus("http://127.0.0.1:1", timeout=5).windows(0.0, 200.0)


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


def test_recordings_come_back_and_bad_ones_say_why(tmp_path: Path) -> None:
    draw = np.random.default_rng(15)
    windows = [stretch(draw, 60.0 * index) for index in range(3)]
    file = Recorded(tmp_path / "w.json")
    file.write(windows)
    assert file.windows() == windows
    assert file.windows(60.0, 130.0) == windows[1:2]
    good = json.loads(file.path.read_text())
    for text, reason in (
        ("{", "w.json"),
        ('{"windows": []}', "no list"),
        (json.dumps({"windows": [good["windows"][0], {"start": 1}]}), "window 1: no 'seconds'"),
        (json.dumps({"windows": [good["windows"][0] | {"prompts": {"bounds": [2, 1], "counts": [1, 1], "total": 3}}]}),
         "window 0: .*ascending"),
        (json.dumps({"windows": [good["windows"][0] | {"seconds": 0}]}), "0 seconds"),
    ):  # fmt: skip
        file.path.write_text(text)
        with pytest.raises(WatchError, match=reason):
            file.windows()
    other = replace(windows[0].prompts, bounds=(1.0, 2.0, 3.0, 4.0, 5.0))
    with pytest.raises(WatchError, match="different buckets"):
        Histogram.joined([windows[0].prompts, other])
