"""Simulated prefill ahead of its items against vLLM's own scheduler with the suite's rule of admission."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from replay_engine import EngineSettings, Worker, _hasher, make_request, make_scheduler
from replay_traces import Row
from replay_workload import Room
from test_replay_decode import STEPS, Flat

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.handover import Event
from vllm_suite.planner.simulator.instances import Leg
from vllm_suite.planner.simulator.overlap import Overlapping

# Of an item: tokens before it, its own, and when it is there.
Place = tuple[int, int, float]


def half_of_the_plugin(now: Any, ready: dict[str, float]) -> Any:
    """The plugin's consumer, to which an item is there from its time on and under way before."""
    from vllm_epd.consumer import Consumer

    class Timed(Consumer):
        def __init__(self) -> None:
            self._failed, self._unavailable, self._holding = set(), set(), set()
            self._lookahead, self._overlap = 0, True
            self._ledger = SimpleNamespace(ready=lambda identifier: ready[identifier] <= now())  # type: ignore[assignment]
            self._stats = SimpleNamespace(count=lambda *names: None)  # type: ignore[assignment]
            self.keeps = lambda identifier: True

        def under_way(self, request_id: str, identifier: str) -> bool:
            return ready[identifier] > now()

        def _have(self, request: Any, index: int) -> bool:
            return ready[request.mm_features[index].identifier] <= now()

        def _sound(self, request: Any) -> bool:
            return True

        def use_manager(self, manager: Any) -> None:
            self.manager = manager

        # What vLLM's scheduler calls by way of the connector.
        def ensure_cache_available(self, request: Any, computed: int) -> bool:
            return self.admit(request, computed)

        def has_cache_item(self, identifier: str) -> bool:
            return bool(ready[identifier] <= now())

        def take_unavailable_requests(self) -> set[str]:
            return self.take_unavailable()

        def request_finished(self, request: Any) -> tuple[bool, None]:
            return False, None

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):
                raise AttributeError(name)
            return lambda *args, **more: None

    return Timed()


def vllm_prefills(rows: list[Row], items: list[list[Place]], settings: EngineSettings) -> tuple[list[float], int]:
    """When vLLM's scheduler has the first token of each request, of which there is one; and preemptions."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

    from vllm_epd.manager import SuiteEncoderCacheManager

    now, times = 0.0, {f"i{n}-{at}": ready for n, each in enumerate(items) for at, (_, _, ready) in enumerate(each)}
    scheduler, half = make_scheduler(settings), half_of_the_plugin(lambda: now, times)
    scheduler.ec_connector, scheduler.encoder_cache_manager = half, SuiteEncoderCacheManager(1 << 20, half)
    scheduler.max_num_encoder_input_tokens = 1 << 20
    # As with any connector that is a `kv_producer`: a token under way is dropped where its blocks are taken.
    scheduler.requires_kv_delivery = True
    worker, hasher, first, preemptions = Worker(rows, settings), _hasher(settings), [-1.0] * len(rows), 0
    arrived = done = 0
    live, flying = dict[int, Any](), deque[Any]()
    while done < len(rows):
        while arrived < len(rows) and (rows[arrived].arrival_s or 0.0) <= now:
            request = live[arrived] = make_request(rows[arrived], arrived, hasher)
            # As the router asks a prefill instance for one token.
            request.max_tokens = request.sampling_params.max_tokens = 1
            request.sampling_params.ignore_eos = True
            request.mm_features = [
                MultiModalFeatureSpec(None, "image", f"i{arrived}-{at}", PlaceholderRange(offset=begin, length=length))
                for at, (begin, length, _) in enumerate(items[arrived])
            ]
            scheduler.add_request(request)
            arrived += 1
        orders = scheduler.schedule()
        if orders.total_num_scheduled_tokens:
            flying.append((orders, *worker.begin(scheduler, orders)))
            if len(flying) < (2 if settings.ahead else 1):
                continue
        elif not flying:
            scheduler.update_from_output(orders, worker.finish([], []))
            following = [time for time in times.values() if time > now]
            if arrived < len(rows):
                following.append(rows[arrived].arrival_s or 0.0)
            now = min(following)
            continue
        orders, batch, names, samples = flying.popleft()
        now += STEPS.step_seconds(batch)
        answers = scheduler.update_from_output(orders, worker.finish(names, samples))
        for answer in answers[0].outputs if 0 in answers else ():
            if answer.finish_reason is not None:
                index = int(answer.request_id[1:])
                first[index] = now
                preemptions += live.pop(index).num_preemptions
                done += 1
    return first, preemptions


def ours(rows: list[Row], items: list[list[Place]], limits: Limits) -> tuple[list[Leg], Overlapping]:
    """The same by a simulated prefill instance."""
    clock = Clock()
    engine = Overlapping(clock, Flat(), limits, lambda job, now: None, prefill_only=True)
    legs = []
    for index, (row, own) in enumerate(zip(rows, items, strict=True)):
        leg = Leg(index, row.arrival_s or 0.0, row.prompt, 1, prefix=row.prefix)
        leg.pending = tuple((begin, begin + length, index * 100 + at) for at, (begin, length, _) in enumerate(own))
        for at, (_, _, ready) in enumerate(own):

            def there(now: float, version: int, leg: Leg = leg) -> None:
                engine.arrived(leg, version, now)

            # Before steps that end at that time, as the loop above has it.
            clock.post(ready, Event.MOVED, index, index * 100 + at, there)
        legs.append(leg)
    clock.feed(legs, engine.accept)
    clock.run()
    return legs, engine


CASES = {
    # blocks, sequences, budget, requests, mean gap and longest time of an item in units of 1/1024 s
    "idle": (2000, 8, 2048, 40, 300, 500),
    "budget": (2000, 32, 128, 60, 30, 300),
    "seats": (2000, 3, 512, 60, 20, 200),
    "cache": (90, 16, 256, 60, 10, 300),
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_prompt_is_done_when_vllms_scheduler_is(case: str, caching: bool, ahead: bool) -> None:
    blocks, seqs, budget, count, gap, longest = CASES[case]
    draw, now, rows, items = random.Random(case), 0.0, list[Row](), list[list[Place]]()
    for _ in range(count):
        now += draw.randrange(1, 2 * gap) / 1024
        own, at = list[Place](), 0
        for _ in range(draw.choice([0, 1, 2, 3, 4])):
            at += draw.choice([0, 1, 2, 16, draw.randrange(100)])
            # Off the grid of the steps, so that no item comes in the very moment of a step's end.
            own.append((at, draw.choice([16, 64, 100]), now + draw.randrange(longest) / 1024 + 2.0**-18))
            at += own[-1][1]
        prefix = (draw.randrange(2),) if caching and not own and draw.random() < 0.5 else ()
        rows.append(Row(now, at + draw.randrange(1, 300) + 512 * len(prefix), 1, prefix=prefix))
        items.append(own)
    settings = EngineSettings(
        room=Room(blocks=blocks, seqs=seqs), batched_tokens=budget, prefix_caching=caching, ahead=ahead
    )
    first, preemptions = vllm_prefills(rows, items, settings)
    limits = Limits(
        blocks - 1,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
        async_scheduling=ahead,
    )
    legs, engine = ours(rows, items, limits)
    assert [leg.first_token for leg in legs] == first
    assert engine.preemptions == preemptions
    assert (preemptions > 0) == (case == "cache")
