"""An instance fetches the encoders' outputs of a request: all when all are there, or each as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from vllm_suite.planner.simulator.encode_stage import EncodeStage
from vllm_suite.planner.simulator.encoders import Encoder, Waiter
from vllm_suite.planner.simulator.handover import Costs
from vllm_suite.planner.simulator.instances import Leg
from vllm_suite.planner.simulator.jobs import SimulationError
from vllm_suite.planner.simulator.links import Links
from vllm_suite.planner.simulator.overlap import Overlapping
from vllm_suite.planner.simulator.routing import Instance
from vllm_suite.planner.simulator.token_cache import Key
from vllm_suite.planner.workload import Item, positions

_Done = Callable[[float], None]


class Fetches:
    """Of one fleet. `done(time)` follows when the last item of a request is there and its encoders were told."""

    def __init__(self, stage: EncodeStage, links: Links, costs: Costs) -> None:
        self.stage, self.links, self.costs = stage, links, costs

    def all(self, waiter: Waiter, instance: Instance, now: float, done: _Done) -> None:
        """Fetch items that are all there."""
        left = len(waiter.sources)

        def moved(then: float) -> None:
            nonlocal left
            left -= 1
            if left:
                return
            instance.transfer_seconds += then - now
            self.stage.fetched(waiter)
            done(then)

        for source in waiter.sources:
            self._start(source, instance, now, moved)

    def as_they_come(
        self, waiter: Waiter, items: Sequence[Item], instance: Instance, leg: Leg, now: float, done: _Done
    ) -> None:
        """Tell a leg what it has to wait for, and fetch each item when it is there.

        Raises:
            SimulationError: items that overlap, or go beyond the prompt.
        """
        engine = instance.engine
        assert isinstance(engine, Overlapping)
        leg.pending = _places(leg, items, waiter)
        begun, parts = 0, dict[Key, int]()

        def pull(then: float) -> None:
            nonlocal begun
            sources, begun = waiter.sources[begun:], len(waiter.sources)
            for _, _, key in sources:
                parts[key] = parts.get(key, 0) + 1
            for source in sources:
                self._start(source, instance, then, partial(moved, source[2], then))

        def moved(key: Key, since: float, then: float) -> None:
            parts[key] -= 1
            if parts[key]:
                return
            instance.transfer_seconds += then - since
            engine.arrived(leg, key, then)
            if not leg.pending:
                waiter.landed = None
                self.stage.fetched(waiter)
                done(then)

        waiter.landed = pull
        pull(now)

    def _start(self, source: tuple[Encoder, float, Key], instance: Instance, now: float, moved: _Done) -> None:
        encoder, size, _ = source
        cost = self.costs.item(encoder.place, instance.place, size)
        instance.transfers += 1
        instance.transfer_bytes += size
        self.links.start(encoder.place.number, instance.place.number, cost, now, moved)


def _places(leg: Leg, items: Sequence[Item], waiter: Waiter) -> tuple[tuple[int, int, Key], ...]:
    """See `Leg.pending`."""
    try:
        begins = positions(items)
    except ValueError as error:
        raise SimulationError(f"request {leg.number}: {error}") from error
    places = tuple(
        (begin, begin + item.tokens, key) for begin, item, key in zip(begins, items, waiter.keys, strict=True)
    )
    if places[-1][1] > leg.prompt:
        raise SimulationError(
            f"request {leg.number}: its items go up to token {places[-1][1]} of a prompt of {leg.prompt}"
        )
    return places
