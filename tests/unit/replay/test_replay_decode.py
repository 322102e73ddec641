"""A simulated decode instance against vLLM's own scheduler with a connector that pulls, request by request."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import pytest
from replay_engine import EngineSettings, Worker, _hasher, make_request, make_scheduler
from replay_steps import AffineSteps
from replay_traces import Row
from replay_workload import Room
from test_replay_simulator import Affine

from vllm_suite.planner.simulator.clock import Clock
from vllm_suite.planner.simulator.engine import Limits
from vllm_suite.planner.simulator.handover import Event
from vllm_suite.planner.simulator.instances import Leg, Receiving
from vllm_suite.planner.sources.steps import Steps

# The replay takes a last chunk of one token for a decoded one, so prompt tokens cost nothing of their own here.
STEPS = AffineSteps(step=2.0**-7, per_sequence=2.0**-16, per_kv_token=2.0**-26, per_prefill_token=0.0)
PULL = 5.0 / 1024
"""Seconds of every pull, whatever its size."""


class Flat(Affine):
    """The same step times for the simulator."""

    def step_seconds(self, steps: Steps) -> float:
        return float(STEPS.step_seconds(steps))


class PullingConnector:
    """The scheduler's half of a connector by which every prompt comes from elsewhere, once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ends: dict[str, float] = {}
        self.begun: dict[str, float] = {}
        self.tokens: dict[str, int] = {}

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        if request.request_id in self.begun:
            return 0, False
        return request.num_prompt_tokens - computed, True

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        if external:
            self.begun[request.request_id] = self.now
            self.ends[request.request_id] = self.now + PULL
            self.tokens[request.request_id] = external

    def request_finished(self, request: Any, blocks: Any) -> tuple[bool, None]:
        return False, None

    def has_pending_block_frees(self) -> bool:
        return False

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return ()

    def take_events(self) -> tuple[Any, ...]:
        return ()

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: None

    def arrived(self, now: float) -> set[str]:
        """Pulls that have ended, each told once."""
        found = {name for name, end in self.ends.items() if end <= now}
        for name in found:
            del self.ends[name]
        return found


def vllm_decodes(rows: list[Row], settings: EngineSettings) -> tuple[list[float], list[float], PullingConnector]:
    """When each request has its first and its last token."""
    from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

    scheduler, connector = make_scheduler(settings), PullingConnector()
    scheduler.connector = connector
    worker, hasher = Worker(rows, settings), _hasher(settings)
    worker._reached = [row.prompt for row in rows]
    first, last = [-1.0] * len(rows), [-1.0] * len(rows)
    now, arrived, done = 0.0, 0, 0
    flying: deque[Any] = deque()
    while done < len(rows):
        while arrived < len(rows) and (rows[arrived].arrival_s or 0.0) <= now:
            scheduler.add_request(make_request(rows[arrived], arrived, hasher))
            arrived += 1
        connector.now = now
        orders = scheduler.schedule()
        if orders.total_num_scheduled_tokens:
            flying.append((orders, *worker.begin(scheduler, orders)))
            if len(flying) < (2 if settings.ahead else 1):
                continue
        elif not flying:
            # An idle engine makes steps without a forward pass until something happens.
            times = list(connector.ends.values())
            if arrived < len(rows):
                times.append(rows[arrived].arrival_s or 0.0)
            now = max(now, min(times))
            told = KVConnectorOutput(finished_recving=connector.arrived(now))
            scheduler.update_from_output(orders, ModelRunnerOutput([], {}, [], kv_connector_output=told))
            continue
        orders, batch, names, samples = flying.popleft()
        now += STEPS.step_seconds(batch)
        report = worker.finish(names, samples)
        report.kv_connector_output = KVConnectorOutput(finished_recving=connector.arrived(now))
        answers = scheduler.update_from_output(orders, report)
        for answer in answers[0].outputs if 0 in answers else ():
            index = int(answer.request_id[1:])
            if first[index] < 0 and answer.new_token_ids:
                first[index] = now
            if answer.finish_reason is not None:
                last[index] = now
                done += 1
    return first, last, connector


def ours(rows: list[Row], limits: Limits) -> tuple[list[Leg], Receiving, dict[int, tuple[float, int]]]:
    """The same by a simulated decode instance; the legs, and when each pull began with how many blocks."""
    clock, pulls = Clock(), dict[int, tuple[float, int]]()
    engine = Receiving(clock, Flat(), limits, lambda job, now: None)

    def pull(leg: Leg, blocks: int, now: float) -> bool:
        pulls[leg.number] = (now, blocks)
        clock.post(now + PULL, Event.MOVED, leg.number, 0, lambda then, version: engine.pulled(leg, then))
        return True

    engine.pull = pull
    legs = []
    for index, row in enumerate(rows):
        leg = Leg(index, row.arrival_s or 0.0, row.prompt, row.output, prefix=row.prefix)
        leg.cached, leg.remote = row.prompt - 1, True
        legs.append(leg)
    clock.feed(legs, engine.accept)
    clock.run()
    return legs, engine, pulls


CASES = {
    # blocks, sequences, budget, requests, mean gap in units of 1/1024 s
    "seats": (2000, 4, 512, 60, 300),
    "budget": (2000, 32, 32, 60, 50),
    "cache": (150, 32, 512, 60, 100),
    "tight cache": (90, 16, 64, 60, 60),
    "idle": (2000, 8, 8192, 40, 3000),
}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_request_is_pulled_and_decoded_when_vllms_scheduler_does_it(
    case: str, caching: bool, ahead: bool
) -> None:
    blocks, seqs, budget, count, gap = CASES[case]
    draw, at, rows = random.Random(case), 0.0, []
    for _ in range(count):
        at += draw.randrange(1, 2 * gap) / 1024
        prefix = tuple(draw.randrange(2) for _ in range(draw.randrange(2))) if caching else ()
        rows.append(Row(at, draw.randrange(1, 900), draw.randrange(1, 300), prefix=prefix))
    room = Room(blocks=blocks, seqs=seqs)
    settings = EngineSettings(room=room, batched_tokens=budget, prefix_caching=caching, ahead=ahead)
    first, last, connector = vllm_decodes(rows, settings)
    limits = Limits(
        blocks - 1,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        prefix_caching=caching,
        async_scheduling=ahead,
    )
    legs, engine, pulls = ours(rows, limits)
    assert [pulls[index][0] for index in range(count)] == [connector.begun[f"r{index}"] for index in range(count)]
    assert [pulls[index][1] for index in range(count)] == [
        -(-connector.tokens[f"r{index}"] // 16) for index in range(count)
    ]
    assert [leg.first_token for leg in legs] == first
    assert [leg.last_token for leg in legs] == last
    assert (engine.free, engine.kept) == (limits.blocks, 0)
    assert (engine.preemptions > 0) == case.endswith("cache")
    assert any(leg.found for leg in legs) == caching
