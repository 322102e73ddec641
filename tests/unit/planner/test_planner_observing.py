"""Observers of a fleet: which pool an engine is in, whatever its number, and encoders as tracks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fleets import ALL_DISAGGREGATED, plan, setting
from simulated import ExactSource

from vllm_suite.planner.observing import Both, PoolOf
from vllm_suite.planner.plan import Plan
from vllm_suite.planner.report.series import PoolSeries
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Engine, Limits
from vllm_suite.planner.simulator.fleet import simulate_plan
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.switching import Switch, Switching
from vllm_suite.planner.timeline import Timeline
from vllm_suite.planner.workload import Item, Request

PICTURE = Item("picture", 64)


class Roles:
    """An observer that notes the role of each engine, by its number."""

    def __init__(self, plan: Plan) -> None:
        self.pool, self.found = PoolOf(plan), dict[int, set[str]]()

    def __call__(self, engine: Any, *what: Any) -> None:
        self.found.setdefault(engine.number, set()).add(self.pool(engine).role)


def test_batches_of_encoders_are_seen() -> None:
    epd = plan(encode={"count": 2, "max_items": 2}, prefill={}, decode={})
    timeline, series = Timeline(epd, seconds=1000.0), PoolSeries(epd)
    fleet = replace(setting(serving=ALL_DISAGGREGATED), encode_seconds=lambda pool, item: 0.5)
    requests = [Request(n, 1.0, 400, 2, items=(PICTURE,) * 5) for n in range(2)]
    run = simulate_plan(epd, fleet, requests, timeline.served, observer=Both(timeline, series))
    seen = [event for event in timeline.as_json()["traceEvents"] if event.get("cat") == "encode"]
    assert {event["tid"] for event in seen} == {0, 1}
    assert all(event["pid"] == 1 and event["dur"] == 0.5e6 * event["args"]["items"] for event in seen)
    assert sum(event["args"]["items"] for event in seen) == run.pools["encode"].encoded == 10
    names = {(row["pid"], row["args"]["name"]) for row in timeline.as_json()["traceEvents"] if row["ph"] == "M"}
    assert {(1, "pool encode"), (1, "encode 0"), (1, "encode 1"), (2, "prefill 2"), (3, "decode 3")} <= names
    # Two encoders: shares of the time of both, and items side by side.
    middles, (busy, _, items) = series.of("encode")
    width = middles[1] - middles[0]
    assert busy.sum() * width * 2 == pytest.approx(sum(run.pools["encode"].busy)) == 5.0
    assert items.sum() * width * 2 == pytest.approx(sum(event["args"]["items"] ** 2 * 0.5 for event in seen))
    assert series.of("prefill")[1][0].sum() * width == pytest.approx(sum(run.pools["prefill"].busy))


def test_an_observer_without_encoders_is_not_told_of_them() -> None:
    epd = plan(encode={}, prefill={}, decode={})
    roles, series = Roles(epd), PoolSeries(epd)
    fleet = replace(setting(serving=ALL_DISAGGREGATED), encode_seconds=lambda pool, item: 0.5)
    simulate_plan(epd, fleet, [Request(0, 0.0, 80, 2, items=(PICTURE,))], lambda served: None,
                  observer=Both(roles, series))  # fmt: skip
    assert roles.found == {1: {"prefill"}, 2: {"decode"}}
    assert series.of("encode")[1][0].sum() > 0
    simulate_plan(epd, fleet, [Request(0, 0.0, 80, 2, items=(PICTURE,))], lambda served: None, observer=roles)


def test_an_engine_that_changed_its_role_is_in_its_new_pool() -> None:
    both = plan(prefill={"count": 2}, decode={"count": 1})
    roles, asked = Roles(both), list[float]()

    def once(stages: Any, now: float) -> Switch | None:
        asked.append(now)
        return Switch("prefill", "decode") if len(asked) == 1 else None

    requests = [Request(n, n * 10.0, 64, 4) for n in range(20)]
    run = simulate_plan(both, setting(serving=ALL_DISAGGREGATED), requests, lambda served: None, observer=roles,
                        switching=Switching(once, every=15.0))  # fmt: skip
    assert len(run.switches) == 1
    assert roles.found == {0: {"prefill"}, 1: {"prefill"}, 2: {"decode"}, 3: {"decode"}}


def test_an_engine_of_no_fleet_is_refused() -> None:
    engine = Engine(Clock(), ExactSource(), Limits(10), lambda job, now: None, number=7)
    with pytest.raises(SimulationError, match="engine 7 is in no pool"):
        PoolOf(plan(prefill={}, decode={}))(engine)
