"""One controller and what may go wrong around a look; the fleet is scripted, the decisions are real."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from vllm_suite.roles import client
from vllm_suite.roles import controller as module
from vllm_suite.roles.client import Access, NoAnswer
from vllm_suite.roles.config import RolesSpec
from vllm_suite.roles.controller import SURE_S, Controller
from vllm_suite.roles.seen import Seen

SPEC = RolesSpec.model_validate({"agree": 1, "hold": 100})


class Fleet:
    """Three that prefill, one that decodes with a long queue. `asked` are the switches: instance, target, give back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lease: Any = None) -> None:
        one = Seen("p0", "", "e", "prefill", 0, "serving", True, ("prefill", "decode"), 0, 0)
        self.seen = [one, replace(one, instance_id="p1"), replace(one, instance_id="p2")]
        self.seen.append(replace(one, instance_id="d0", role="decode", queue=20))
        self.troubles: list[str] = []
        self.asked: list[tuple[str, str, bool]] = []
        self.answers, self.outcome = True, "begun"
        self.now = 0.0
        self.look_takes = 0.0
        monkeypatch.setattr(module, "look", self.look)
        monkeypatch.setattr(module, "switch", self.switch)
        registry = CollectorRegistry()
        self.controller = Controller(SPEC, Access("http://x"), registry, lease=lease, clock=lambda: self.now)
        self.count = registry.get_sample_value

    async def look(self, session: Any, access: Any) -> tuple[list[Seen], list[str]]:
        self.now += self.look_takes
        return self.seen, self.troubles

    async def switch(self, session: Any, one: Seen, target: str, key: Any, give_back: bool, *_: Any) -> dict[str, Any]:
        self.asked.append((one.instance_id, target, give_back))
        if not self.answers:
            raise NoAnswer("no answer")
        return {"outcome": self.outcome}

    async def once(self) -> Any:
        return await self.controller.once(None)  # type: ignore[arg-type]


class Held:
    """A Lease that is held until some time."""

    def __init__(self) -> None:
        self.until = 10.0
        self.fleet: Fleet | None = None

    async def hold(self) -> str:
        return "leader"

    def left(self) -> float:
        return self.until - (self.fleet.now if self.fleet is not None else 0.0)


async def test_nothing_is_switched_while_one_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.troubles = ["http://p3 gives no answer"]
    assert await fleet.once() is None
    fleet.troubles = []
    assert await fleet.once() is not None
    # Two more prefill: what waits there is theirs.
    assert fleet.asked == [("p0", "decode", True)]


async def test_what_gives_no_answer_may_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.answers = False
    assert await fleet.once() is not None
    # The next one waits as long as after a switch.
    fleet.now += SPEC.hold - 1
    assert await fleet.once() is None
    fleet.now += 2
    assert await fleet.once() is not None
    labels = {"source": "prefill", "target": "decode", "why": "rule", "outcome": "no_answer"}
    assert fleet.count("vllm_suite_roles_moves_total", labels) == 2


@pytest.mark.parametrize("dry_run", [True, False])
def test_counters_are_0_from_the_start(dry_run: bool) -> None:
    registry = CollectorRegistry()
    Controller(SPEC, Access("http://x"), registry, dry_run=dry_run)
    rows = [one for family in registry.collect() for one in family.samples if one.name.endswith("_total")]
    assert {one.value for one in rows} == {0}
    moves = [one.labels for one in rows if one.name == "vllm_suite_roles_moves_total"]
    answers = {"dry_run"} if dry_run else {"begun", "noop", "refused", "no_answer"}
    assert {one["outcome"] for one in moves} == answers
    # From `any` to three roles, again or at the start; by the rule from any of four to another of three.
    assert len(moves) == (3 + 3 + 9) * len(answers)
    assert all(one["source"] != one["target"] != "any" for one in moves)
    # It scales nothing, so it counts none of that.
    assert len(rows) == len(moves) + 5 + 1  # looks; asked without give_back


async def test_a_look_that_takes_long_uses_up_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    lease: Any = Held()
    fleet = lease.fleet = Fleet(monkeypatch, lease)
    fleet.now = -200.0
    lease.until = fleet.now + SURE_S + 1
    assert await fleet.once() is None  # it leads from here on, and waits
    fleet.now = 0.0
    # The lease outlasts the request at the beginning of the look, and no more at its end.
    lease.until, fleet.look_takes = SURE_S + 1, 2.0
    assert await fleet.once() is None
    assert not fleet.asked
    assert fleet.count("vllm_suite_roles_looks_total", {"outcome": "no_api"}) == 1
    lease.until = fleet.now + SURE_S + 10
    assert await fleet.once() is not None


async def test_a_former_role_that_is_refused_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(monkeypatch)
    fleet.seen = [*fleet.seen[:2], replace(fleet.seen[3], queue=0)]
    assert await fleet.once() is None
    fleet.seen[0] = replace(fleet.seen[0], role="any", epoch="f")
    fleet.outcome = "refused"
    assert await fleet.once() is not None
    assert await fleet.once() is None
    assert fleet.asked == [("p0", "prefill", True)]


@pytest.mark.parametrize("another", [True, False])
async def test_the_last_of_a_stage_keeps_its_queue(monkeypatch: pytest.MonkeyPatch, another: bool) -> None:
    fleet = Fleet(monkeypatch)
    free = replace(fleet.seen[0], instance_id="a0", role="any")
    fleet.seen = [free, fleet.seen[3], *([replace(fleet.seen[0])] if another else [])]
    spec = RolesSpec.model_validate({"start": {"prefill": 1 + another}})
    fleet.controller = Controller(spec, Access("http://x"), CollectorRegistry())
    assert await fleet.once() is not None
    assert fleet.asked == [("a0", "prefill", another)]


@pytest.mark.parametrize(("cause", "waits"), [(TimeoutError(), True), (ConnectionRefusedError(), False)])
async def test_a_late_answer_in_a_switch_is_no_end_of_it(
    monkeypatch: pytest.MonkeyPatch, cause: Exception, waits: bool
) -> None:
    one = Seen("d0", "http://x", "e", "decode", 0, "serving", True, ("prefill", "decode"), 0, 0)
    begun = {"epoch": "e", "last": {"attempt": 1, "outcome": None}}
    done = {"epoch": "e", "last": {"attempt": 1, "outcome": "switched"}}
    answers: list[Any] = [begun, cause, done]

    async def role(session: Any, url: str, key: str | None) -> dict[str, Any]:
        found: Any = answers.pop(0)
        if isinstance(found, Exception):
            raise NoAnswer("gives no answer") from found
        assert isinstance(found, dict)
        return found

    monkeypatch.setattr(client, "role", role)
    asked = client.ended(None, one, begun, None, 60.0)  # type: ignore[arg-type]
    if waits:
        assert await asked == done
    else:
        with pytest.raises(NoAnswer):
            await asked
