"""A whole fleet on a virtual clock: every pool of a plan, the router before them, and what goes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from vllm_suite.planner.plan import Plan, Role
from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.company import Company
from vllm_suite.planner.simulator.counters import FleetRun, PoolRun
from vllm_suite.planner.simulator.encoders import Waiter
from vllm_suite.planner.simulator.engine import Observer
from vllm_suite.planner.simulator.fetches import Fetches
from vllm_suite.planner.simulator.flights import Flight, whole
from vllm_suite.planner.simulator.handover import Costs, Event, Lease
from vllm_suite.planner.simulator.instances import Leg, Receiving
from vllm_suite.planner.simulator.jobs import Job, SimulationError
from vllm_suite.planner.simulator.links import Links
from vllm_suite.planner.simulator.members import Members, Way
from vllm_suite.planner.simulator.roles import Roles
from vllm_suite.planner.simulator.routing import Instance, LeastTokens
from vllm_suite.planner.simulator.served import Sink
from vllm_suite.planner.simulator.setting import Setting
from vllm_suite.planner.simulator.switching import Switching
from vllm_suite.planner.workload import Item, Request

__all__ = ["FleetRun", "PoolRun", "simulate_plan"]


def simulate_plan(
    plan: Plan,
    setting: Setting,
    requests: Iterable[Request],
    sink: Sink,
    *,
    observer: Observer | None = None,
    switching: Switching | None = None,
) -> FleetRun:
    """Run a fleet on a trace until every request is done.

    Args:
        requests: in order of arrival, with unique numbers; drawn as the clock reaches them.
        sink: called with each finished request.
        observer: sees every run of steps of every engine, and batches of encoders where it is an `EncodeObserver`.
        switching: engines change their roles by this.

    Raises:
        SimulationError: arrivals out of order, a request that no engine can hold, or one with items where the setting
            has no time for them.
        PlanError: a pool that cannot be run.
    """
    return _Fleet(plan, setting, sink, observer, switching).run(requests)


class _Fleet(Way):
    def __init__(
        self, plan: Plan, setting: Setting, sink: Sink, observer: Observer | None, switching: Switching | None
    ) -> None:
        self.setting, self.serving, self.sink = setting, setting.serving, sink
        self.clock = Clock()
        self.links, self.costs = Links(self.clock, Event.MOVED), Costs(setting)
        self.members = Members(plan, setting, self.clock, self, observer)
        stage = self.members.stage
        self.fetches = Fetches(stage, self.links, self.costs) if stage is not None else None
        self.roles = Roles(self.members, self.clock, switching, self._more) if switching is not None else None
        prefill = plan.pool("prefill")
        self._runs_ahead = prefill is not None and setting.overlaps(prefill)
        self._front: Role = "any" if plan.pool("any") is not None else "decode"
        self._answers, self._prompts = LeastTokens(), LeastTokens()
        self._under_way, self._exhausted, self._end = 0, False, 0.0
        self._company = Company() if setting.serving.busy_s else None

    def run(self, requests: Iterable[Request]) -> FleetRun:
        """Until every request is done."""
        self.clock.feed(self._drawn(requests), self._arrive)
        self.clock.run()
        if self._under_way:
            raise SimulationError(f"{self._under_way} requests were left behind: a fault of the simulator")
        made = tuple(self.roles.made) if self.roles is not None else ()
        return FleetRun(self._end, self.members.runs(self._end), made)

    def _drawn(self, requests: Iterable[Request]) -> Iterator[Request]:
        yield from requests
        self._exhausted = True

    def _more(self) -> bool:
        return self._under_way > 0 or not self._exhausted

    def _hop(self, flight: Flight, stage: int, now: float, then: Callable[[Flight, float], None]) -> None:
        """The router sends the request on."""
        if self.serving.hop_s <= 0:
            then(flight, now)
            return
        number = flight.request.number
        self.clock.post(now + self.serving.hop_s, Event.HOP, number, stage, lambda at, _: then(flight, at))

    def _arrive(self, request: Request, now: float) -> None:
        flight = Flight(request, self._answers.choose(self.members.active[self._front]))
        self._under_way += 1
        if self._company is not None:
            self._company.came(request.number, request.arrival)
        if self.roles is not None:
            self.roles.begin(now)
        if not request.items:
            self._forward(flight, now)
            return
        if self.setting.encode_seconds is None:
            raise SimulationError(f"request {request.number} has items, and the setting has no `encode_seconds`")
        stage = self.members.stage
        if stage is None:
            self._forward(flight, now)
            return
        flight.waiter = waiter = stage.admit(request.items, now, partial(self._encoded, flight))
        if not waiter.left:
            self._encoded(flight, now)
        elif self._overlaps(flight, waiter):
            flight.ahead = True
            self._hop(flight, 0, now, self._forward)

    def _overlaps(self, flight: Flight, waiter: Waiter) -> bool:
        """Whether prefill runs ahead of the items (vllm_suite/router/encode/stage.py)."""
        if not self._runs_ahead or waiter.left < (2 if self.serving.overlap == "auto" else 1):
            return False
        return not whole(flight.request, flight.decode, self.setting)

    # Encode

    def _encoded(self, flight: Flight, now: float) -> None:
        """All items are there: prefill may begin."""
        assert flight.waiter is not None
        flight.served.encode_start, flight.served.encoded = flight.waiter.start, now
        if not flight.ahead:
            self._hop(flight, 0, now, self._forward)

    def _fetch(self, flight: Flight, instance: Instance, leg: Leg, now: float) -> None:
        """Give a leg to an instance, after its items where there are any, or before them."""
        waiter, fetches = flight.waiter, self.fetches
        if waiter is None:
            flight.since = now
            instance.engine.accept(leg, now)
            return
        assert fetches is not None

        def fetched(then: float) -> None:
            flight.waiter, flight.served.fetched = None, then
            if not flight.ahead:
                flight.since = then
                instance.engine.accept(leg, then)
            if self.roles is not None:
                self.roles.check(then)

        if flight.ahead:
            flight.since = now
            fetches.as_they_come(waiter, flight.request.items, instance, leg, now, fetched)
            instance.engine.accept(leg, now)
        else:
            fetches.all(waiter, instance, now, fetched)

    # Prefill

    def _forward(self, flight: Flight, now: float) -> None:
        """To prefill, or past it."""
        prefills, request = self.members.active.get("prefill"), flight.request
        if not prefills or (not flight.ahead and whole(request, flight.decode, self.setting)):
            self._to_decode(flight, now)
            return
        instance = flight.prefill = self._prompts.choose(prefills)
        instance.charge(request.prompt)
        # One token more than prefill samples: the blocks are to be kept.
        self._fetch(flight, instance, flight.leg(2, self._own_items(flight)), now)

    def _own_items(self, flight: Flight) -> tuple[Item, ...]:
        return flight.request.items if self.members.stage is None else ()

    def prefilled(self, instance: Instance, job: Job, now: float) -> None:
        """See `Way`."""
        assert isinstance(job, Leg)
        assert instance.leases is not None
        flight: Flight = job.flight
        # The flight will hold the job; a circle would wait for the garbage collector.
        job.flight, served = None, flight.served
        flight.note_prefilled(instance, job, now)
        instance.discharge(job.prompt)
        if served.output == 1 and self.serving.streams == "prefill":
            instance.engine.release(job.held, now, job)
            served.first_token = served.last_token = now
            self._done(flight, now)
            return
        flight.lease = instance.leases.issue(job, now, self.serving.max_hold_s)
        self._hop(flight, 1, now, self._to_decode)

    def expired(self, instance: Instance, lease: Lease, now: float) -> None:
        """See `Way`."""
        instance.engine.release(lease.job.held, now, lease.job)
        if self.roles is not None:
            self.roles.check(now)

    # Decode

    def _to_decode(self, flight: Flight, now: float) -> None:
        """To the instance that answers: with a reference to the cache, or to compute the prompt itself."""
        if flight.decode.draining:
            flight.decode = self._answers.choose(self.members.active[self._front])
        request, instance = flight.request, flight.decode
        instance.charge(request.prompt + (self.serving.answer_tokens or request.output))
        if request.prefix and instance.history is not None:
            instance.history.add(request.prefix, request.block)
        leg = flight.answer_leg(self._own_items(flight), self.serving.streams)
        self._fetch(flight, instance, leg, now)

    def pull(self, instance: Instance, leg: Leg, blocks: int, now: float) -> bool:
        """See `Way`."""
        flight: Flight = leg.flight
        lease, source = flight.lease, flight.prefill
        assert lease is not None
        assert source is not None
        if lease.lost:
            leg.cached, leg.items = 0, self._own_items(flight)
            return False
        lease.open = False
        flight.served.transfer_start = now
        cost = self.costs.kv(source.place, instance.place, blocks)

        def moved(then: float) -> None:
            flight.served.transferred = then
            instance.transfers += 1
            instance.transfer_bytes += cost.size
            instance.transfer_seconds += then - now
            source.engine.release(lease.job.held, then, lease.job)
            engine = instance.engine
            assert isinstance(engine, Receiving)
            engine.pulled(leg, then)
            if self.roles is not None:
                self.roles.check(then)

        self.links.start(source.place.number, instance.place.number, cost, now, moved)
        return True

    def finished(self, instance: Instance, job: Job, now: float) -> None:
        """See `Way`."""
        assert isinstance(job, Leg)
        flight: Flight = job.flight
        flight.note_answered(instance, job)
        instance.discharge(job.prompt + (self.serving.answer_tokens or job.output))
        self._done(flight, now)

    def _done(self, flight: Flight, now: float) -> None:
        self._under_way -= 1
        self._end = now
        served, serving = flight.served, self.serving
        if self._company is not None:
            served.company_s = serving.busy_s * self._company.left(served.number, served.first_token, served.last_token)
        served.request_s, served.prompt_s = serving.request_s, serving.prompt_token_s * served.prompt
        self.sink(served)
        if self.roles is not None:
            self.roles.check(now)
