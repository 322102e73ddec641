"""What a soak decides by: its schedule, the verdict on an answer, the slope of a life, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from soak import conclude, tracebacks
from soak_faults import Done, explained
from soak_load import Record, Tally, compare, judge_refusal, questions
from soak_schedule import LIVES_FROM, Event, schedule
from soak_watch import Life, slope

NAMES = ("p-0", "d-0", "a-0")


def test_a_seed_gives_one_schedule() -> None:
    first = schedule(3, 1200, NAMES, ("a-0",), (8, 20))
    assert first == schedule(3, 1200, NAMES, ("a-0",), (8, 20))
    assert first != schedule(4, 1200, NAMES, ("a-0",), (8, 20))
    assert {event.kind for event in first} == {"kill", "restart", "freeze", "switch"}
    assert [event.at_s for event in first] == sorted(event.at_s for event in first)
    assert all(event.target == "a-0" for event in first if event.kind == "switch")
    assert all(event.at_s < LIVES_FROM * 1200 for event in first if event.kind in ("kill", "restart"))
    assert sorted(event.kind for event in first if event.target == "router") == ["kill", "restart"]
    assert first[-1].at_s < 1180


def test_nothing_switches_where_nothing_can() -> None:
    events = schedule(3, 600, NAMES[:2], (), (1, 2))
    assert "switch" not in {event.kind for event in events}


def test_a_seed_asks_the_same() -> None:
    assert questions(5, 8) == questions(5, 8)
    assert [q.path for q in questions(5, 4)] == ["/v1/completions"] * 3 + ["/v1/chat/completions"]


def test_answers_are_compared_token_by_token() -> None:
    assert compare([1, 2, 3], (1, 2, 3), complete=True)[0] == "right"
    assert compare([1, 2], (1, 2, 3), complete=True)[0] == "wrong"
    assert compare([1, 2], (1, 2, 3), complete=False)[0] == "right"
    assert compare([1, 3], (1, 2, 3), complete=False)[0] == "wrong"
    assert compare([1, 2, 3, 4], (1, 2, 3), complete=False)[0] == "wrong"


@pytest.mark.parametrize(
    ("status", "text", "wanted", "verdict"),
    [
        (400, "{}", "refused", "refused"),
        (503, '{"error": {"message": "wait"}}', "refused", "error"),
        (500, '{"error": {"message": "the engine is dead"}}', "error", "error"),
        (500, "500 Internal Server Error", "refused", "unclear"),
        (503, "wait", "error", "unclear"),
        (200, "{}", "refused", "unclear"),
        (503, "", "error", "unclear"),
        (400, "no", "error", "unclear"),
    ],
)
def test_refusals(status: int, text: str, wanted: Any, verdict: str) -> None:
    assert judge_refusal(status, text, wanted)[0] == verdict


def life(rss_mib_per_min: float, files_per_min: float, seconds: float = 400, role: str = "decode") -> Life:
    found = Life("d-0", role, 7)
    for step in range(int(seconds / 2)):
        found.at_s.append(2.0 * step)
        # A pool that is filled at the start, and noise: neither is a leak.
        warm = min(step, 20) * (8 << 20) + (step % 3) * (1 << 18)
        found.rss.append((1 << 30) + warm + int(rss_mib_per_min * (1 << 20) * step / 30))
        found.files.append(50 + step % 4 + int(files_per_min * step / 30))
    return found


def test_a_leak_is_seen_and_a_warm_up_is_none() -> None:
    flat = life(0, 0).document()
    assert (flat["judged"], flat["flat"]) == (True, True)
    assert life(6, 0).document()["flat"] is False
    assert life(0, 2).document()["flat"] is False
    assert life(2, 0).document()["flat"] is True
    assert life(2, 0, role="router").document()["flat"] is False
    assert life(60, 0, seconds=100).document()["judged"] is False


def test_the_slope_is_that_of_most_points() -> None:
    at = [float(i) for i in range(50)]
    assert slope(at, [3 * value for value in at]) == pytest.approx(3)
    assert slope(at, [3 * value + (1000 if value == 20 else 0) for value in at]) == pytest.approx(3, abs=0.1)
    assert slope([1.0], [5]) == 0


def report(outcome: Any = "right", **facts: Any) -> dict[str, Any]:
    tally = Tally([Record(0, 0, "whole", 1.0, facts.pop("ended_s", 2.0), outcome, "why")])
    done = [Done(Event(1.0, "kill", "d-0"), 1.0, 5.0, facts.pop("result", "back"))]
    held = {"d-0": {"leases": facts.pop("held", 0.0)}}
    crashes = facts.pop("crashes", [])
    all_facts = {"bench_serve": None, "held_at_end": held, **facts}
    return conclude(tally, done, [life(facts.pop("leak", 0), 0)], True, crashes, all_facts)


def test_a_report_that_is_well() -> None:
    found = report()
    assert found["ok"] is True
    json.dumps(found)


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ({"outcome": "wrong"}, "no wrong answer"),
        ({"outcome": "stuck"}, "no stuck request"),
        ({"bench_serve": {"ended": False}}, "no stuck request"),
        ({"outcome": "unclear"}, "every end is clear"),
        ({"outcome": "error", "ended_s": 50.0}, "every error is near a fault"),
        ({"result": "NOT BACK: failed"}, "every fault came to its end"),
        ({"result": ""}, "every fault came to its end"),
        ({"held": 1.0}, "nothing is held at the end"),
        ({"leak": 9}, "memory and files are flat"),
        ({"plan": {"seconds": 1200}}, "memory and files are flat"),  # nobody saw the router long enough
        ({"crashes": ["KeyError: 1"]}, "no exception in the router's log"),
    ],
)
def test_each_check_can_fail(given: dict[str, Any], check: str) -> None:
    found = report(**given)
    assert found["ok"] is False
    assert [name for name, held in found["checks"].items() if not held] == [check]


def test_errors_are_put_beside_faults() -> None:
    done = [
        Done(Event(1.0, "kill", "d-0"), 10.0, 20.0, "back"),
        Done(Event(2.0, "kill", "d-0"), 90.0, 90.1, "left out: x"),
    ]
    assert explained(done, 15)
    assert explained(done, 24)
    assert not explained(done, 40)
    assert not explained(done, 91)
    found = report("error", held=0.0)
    assert (found["ok"], found["errors_outside_faults"]) == (True, [])


def test_tracebacks_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\nTraceback (most recent call last):\n  File x\n    y\nKeyError: 'z'\nb\n")
    assert tracebacks(log) == ["KeyError: 'z'"]
