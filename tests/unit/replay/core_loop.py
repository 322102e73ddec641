"""vLLM's own scheduler behind its engine core's loop, for several batches under way: on a virtual clock.

The loop is that of `EngineCore.step_with_batch_queue`, an empty batch included; with one place in the queue it is
`EngineCore.step`. Pipeline stages are a flow shop: a batch holds one after another, each as soon as both are free. It
enters the first once the last has sampled the tokens that it decodes from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from replay_engine import EngineSettings, Worker, _hasher, make_request, make_scheduler
from replay_traces import Row

from vllm_suite.planner.sources.steps import Steps


@dataclass
class Served:
    """By request: times of every token, tokens found in the prefix cache at the first admission."""

    times: list[list[float]]
    found: list[int]
    preemptions: int = 0
    steps: int = 0
    end: float = 0.0
    labels: list[str] = field(default_factory=list)


class Core:
    """One engine core.

    Args:
        places: batches that may be under way.
        stage_times: seconds in each pipeline stage.
        stagger: steps between two tokens of a request, as the second model runner has it with pipelines.
        known: lengths are told to the scheduler, as `max_tokens` without an end of sequence.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        settings: EngineSettings,
        stage_times: Callable[[Steps], Sequence[float]],
        *,
        places: int = 1,
        stagger: int = 1,
        known: bool = False,
    ) -> None:
        self.rows, self.settings, self.stage_times, self.places, self.known = rows, settings, stage_times, places, known
        self.now = 0.0
        self.scheduler = make_scheduler(settings, lambda: self.now)
        if stagger > 1:
            self.scheduler.use_v2_model_runner, self.scheduler.decode_stagger = True, stagger
        self.hasher, self.worker = _hasher(settings), Worker(rows, settings)
        self.served = Served([[] for _ in rows], [-1] * len(rows))
        self.queue: deque[tuple[Any, list[str], list[bool], float]] = deque()
        self.stages: list[float] = []
        self.last_end = 0.0
        self.decoding: set[str] = set()
        self.known_at: dict[str, float] = {}
        self.live: dict[str, Any] = {}
        self.unfinished = 0
        self.seconds: list[float] = []

    def add(self, index: int) -> None:
        row = self.rows[index]
        request = make_request(row, index, self.hasher)
        if self.known:
            request.max_tokens = request.sampling_params.max_tokens = row.output
            request.sampling_params.ignore_eos = True
        self.scheduler.add_request(request)
        self.live[f"r{index}"] = request
        self.unfinished += 1

    def steps_of(self, orders: Any) -> Steps:
        """What a step computes. One that was admitted in it, or is amid its prompt, is in prefill."""
        chunks, contexts = [], []
        resumed = set(orders.scheduled_cached_reqs.resumed_req_ids) | {new.req_id for new in orders.scheduled_new_reqs}
        for new in orders.scheduled_new_reqs:
            index = int(new.req_id[1:])
            if self.served.found[index] < 0:
                self.served.found[index] = new.num_computed_tokens
        for name, count in orders.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            before = request.num_computed_tokens - count
            if name in self.decoding and name not in resumed:
                assert count == 1
                contexts.append(before + 1)
            else:
                chunks.append((count, before))
                self.decoding.discard(name)
                if not request.is_prefill_chunk:
                    self.decoding.add(name)
        return Steps.of(chunks, contexts)

    def turn(self) -> bool:
        """Schedule one batch where there is something; whether the loop comes back without waiting."""
        if not self.scheduler.has_requests():
            return False
        orders = self.scheduler.schedule()
        samples = [not self.scheduler.requests[name].is_prefill_chunk for name in orders.num_scheduled_tokens]
        end, ran = max(self.now, self.last_end), bool(orders.total_num_scheduled_tokens)
        if ran:
            self.served.steps += 1
            before = self.decoding.intersection(orders.num_scheduled_tokens)
            steps = self.steps_of(orders)
            waited_for = [self.known_at[name] for name in before & self.decoding if steps.decode_sequences]
            at, times = max([self.now, *waited_for]), self.stage_times(steps)
            self.seconds.append(sum(times))
            self.stages = self.stages or [0.0] * len(times)
            for stage, seconds in enumerate(times):
                at = self.stages[stage] = max(at, self.stages[stage]) + seconds
            end = at
            self.known_at.update(
                (name, end) for name, token in zip(orders.num_scheduled_tokens, samples, strict=True) if token
            )
        self.last_end = end
        self.queue.append((orders, list(orders.num_scheduled_tokens), samples, end))
        return len(self.queue) < self.places and (ran or self.scheduler.has_requests())

    def take(self) -> None:
        """Wait for the oldest batch."""
        orders, names, samples, end = self.queue.popleft()
        self.now = max(self.now, end)
        answers = self.scheduler.update_from_output(orders, self.worker.finish(names, samples))
        for answer in answers[0].outputs if 0 in answers else ():
            index = int(answer.request_id[1:])
            self.served.times[index] += [self.now] * len(answer.new_token_ids)
            if answer.finish_reason is not None:
                self.served.preemptions += self.live.pop(answer.request_id).num_preemptions
                self.unfinished -= 1
        self.served.end = self.now


def drive(rows: Sequence[Row], *args: Any, **more: Any) -> Served:
    """Serve rows in order of arrival to the last one; arguments are `Core`'s."""
    core, arrived = Core(rows, *args, **more), 0
    while arrived < len(rows) or core.unfinished:
        if not core.unfinished and not core.queue:
            core.now = max(core.now, rows[arrived].arrival_s or 0.0)
        while arrived < len(rows) and (rows[arrived].arrival_s or 0.0) <= core.now:
            core.add(arrived)
            arrived += 1
        if not core.turn() and core.queue:
            core.take()
    return core.served
