"""vLLM's scheduler under the replay's worker: what it is told, what it does, and that it repeats."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from replay_cases import FACTORY, POLICIES, make_policy
from replay_engine import (
    CLASS_ARGUMENT,
    EOS,
    MAX_TOKENS,
    EngineSettings,
    Outcome,
    Worker,
    WorkerError,
    make_request,
    make_scheduler,
    prompt_tokens,
    replay,
)
from replay_harness import ROOM, STEPS
from replay_traces import Row
from replay_workload import Room

SETTINGS = EngineSettings(room=ROOM)


def rows(count: int = 40, seed: int = 0) -> list[Row]:
    """More than four slots and 3,200 tokens of KV cache can take at once."""
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, count * 0.2) for _ in range(count))
    return [Row(at, draw.randrange(20, 900), draw.randrange(1, 300), str(draw.randrange(3))) for at in times]


def seen(value: Any, depth: int = 0) -> Any:
    """Everything reachable from a request, as plain values; functions and types by name."""
    if isinstance(value, str | bytes | int | float | bool | type(None)):
        return value
    if depth > 6:
        return f"<{type(value).__name__}>"
    if isinstance(value, dict):
        return {str(key): seen(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [seen(item, depth + 1) for item in value]
    names = list(getattr(value, "__dict__", ())) + list(getattr(type(value), "__slots__", ()))
    names += list(getattr(type(value), "__struct_fields__", ()))
    return {name: seen(getattr(value, name, None), depth + 1) for name in names} or type(value).__name__


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "oracle"])
def test_what_the_scheduler_is_given_does_not_depend_on_the_recorded_length(policy: str) -> None:
    _, client = make_policy(policy, SETTINGS)
    told = []
    for output in (1, 77, 60001):
        row = Row(1.5, 100, output, "chat")
        request = make_request(row, 3, priority=client.priority(row) if client.priority else 0)
        told.append(seen(request))
        assert request.max_tokens == MAX_TOKENS
        assert request.sampling_params.min_tokens == 0
        assert request.sampling_params.eos_token_id == EOS
        assert request.sampling_params.extra_args == {CLASS_ARGUMENT: "chat"}
    assert told[0] == told[1] == told[2]
    assert str(told[0]).count("60001") == 0


def test_the_oracle_alone_is_told() -> None:
    _, client = make_policy("oracle", SETTINGS)
    assert client.priority is not None
    assert client.priority(Row(0.0, 5, 60001)) == 60001


def journal(settings: EngineSettings, work: list[Row], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the scheduler orders, step by step, until the first request has ended."""
    import replay_engine

    orders: list[Any] = []
    begin, finish = Worker.begin, Worker.finish

    def recorded(self: Worker, scheduler: Any, order: Any) -> Any:
        orders.append(dict(order.num_scheduled_tokens))
        return begin(self, scheduler, order)

    def ended(self: Worker, names: list[str], samples: list[bool]) -> Any:
        report = finish(self, names, samples)
        if any(EOS in tokens for tokens in report.sampled_token_ids):
            orders.append("end")
        return report

    monkeypatch.setattr(replay_engine.Worker, "begin", recorded)
    monkeypatch.setattr(replay_engine.Worker, "finish", ended)
    replay(work, settings, STEPS)
    monkeypatch.undo()
    return orders[: orders.index("end")]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("scheduler_cls", [None, FACTORY])
def test_until_one_ends_no_order_depends_on_the_lengths(
    scheduler_cls: str | None, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, scheduler_cls=scheduler_cls, ahead=ahead)
    first = [Row(0.0, 30, 60, "a")]
    short = first + [Row(0.01 * i, 200 + i, 70 + i, "ab"[i % 2]) for i in range(12)]
    long = first + [Row(0.01 * i, 200 + i, 600 - i, "ab"[i % 2]) for i in range(12)]
    orders = journal(settings, short, monkeypatch)
    assert len(orders) >= 60
    assert orders == journal(settings, long, monkeypatch)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_request_ends_at_its_length_and_runs_repeat(policy: str, ahead: bool) -> None:
    def run() -> Outcome:
        settings, client = make_policy(policy, replace(SETTINGS, ahead=ahead))
        return replay(rows(), settings, STEPS, client)

    first, second = run(), run()
    assert first.outputs == [row.output for row in rows()]
    assert all(0 < token <= last for token, last in zip(first.first_token, first.latency, strict=True))
    assert replace(first, overhead_s=0.0) == replace(second, overhead_s=0.0)
    if policy == "fcfs":  # the work is such that requests do give way
        assert first.preemptions > 0
        assert first.recomputed > 0


def test_one_request_by_hand() -> None:
    outcome = replay([Row(0.0, 100, 3)], SETTINGS, STEPS)
    prefill = 9e-3 + 20e-6 + 100 * 22e-9 + 100 * 22e-6
    decode = [9e-3 + 20e-6 + context * 22e-9 for context in (101, 102)]
    assert outcome.first_token == [pytest.approx(prefill)]
    assert outcome.latency == [pytest.approx(prefill + sum(decode))]
    assert (outcome.steps, outcome.preemptions, outcome.recomputed, outcome.busy) == (3, 0, 0, pytest.approx(1.0))


@pytest.mark.parametrize("scheduler_cls", [None, FACTORY])
def test_a_step_ahead_every_request_gets_a_token_in_every_step(scheduler_cls: str | None) -> None:
    # vLLM's scheduler that does not run ahead would take turns between requests that came at different steps.
    settings = replace(SETTINGS, scheduler_cls=scheduler_cls, ahead=True)
    outcome = replay([Row(0.0, 10, 60), Row(0.02, 10, 50)], settings, STEPS)
    assert outcome.steps == 60
    assert outcome.outputs == [60, 50]


def test_the_clock_waits_for_the_next_arrival() -> None:
    outcome = replay([Row(0.0, 10, 2), Row(100.0, 10, 2)], SETTINGS, STEPS)
    assert outcome.latency[0] == pytest.approx(outcome.latency[1])
    assert outcome.makespan > 100


def test_recomputed_tokens_are_those_of_preempted_requests() -> None:
    # Two requests fill the KV cache of 10 blocks; the later one gives way, and its 5 blocks are computed again.
    settings = EngineSettings(room=Room(blocks=11, seqs=4))
    outcome = replay([Row(0.0, 79, 60), Row(0.0, 79, 60)], settings, STEPS)
    assert outcome.preemptions == 1
    assert outcome.recomputed == 80


def test_shared_prefixes_are_shared_and_nothing_else() -> None:
    one, two = Row(0.0, 1200, 5, "", (7, 8, 9)), Row(0.0, 1100, 5, "", (7, 8, 10))
    first, second = prompt_tokens(one, 0), prompt_tokens(two, 1)
    assert (len(first), len(second)) == (1200, 1100)
    assert first[:1024] == second[:1024]
    assert set(first[1024:]).isdisjoint(second[1024:])
    assert set(prompt_tokens(Row(0.0, 50, 5), 2)).isdisjoint(prompt_tokens(Row(0.0, 50, 5), 3))


def test_cached_prefixes_cost_no_prefill() -> None:
    work = [Row(0.0, 1024, 2, "", (1, 2)), Row(5.0, 1024, 2, "", (1, 2)), Row(10.0, 1024, 2, "", (3, 2))]
    cached = replay(work, replace(SETTINGS, prefix_caching=True), STEPS)
    # The last block of a prompt is always computed, for the first token.
    assert cached.first_token[0] - cached.first_token[1] == pytest.approx(1008 * 22e-6, rel=0.01)
    assert cached.first_token[2] == pytest.approx(cached.first_token[0])


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"request 1: 3000 \+ 300 tokens; the KV cache holds 3200"):
        replay([Row(0.0, 10, 10), Row(0.0, 3000, 300)], SETTINGS, STEPS)


def test_the_worker_refuses_what_no_model_runner_could_do() -> None:
    scheduler = make_scheduler(SETTINGS)
    work = [Row(0.0, 100, 5)]
    scheduler.add_request(make_request(work[0], 0))
    orders = scheduler.schedule()
    scheduler.requests["r0"].num_computed_tokens += 16
    with pytest.raises(WorkerError, match="r0: tokens 0 to 16 are skipped"):
        Worker(work, SETTINGS).begin(scheduler, orders)
    scheduler.requests["r0"].num_computed_tokens -= 16
    with pytest.raises(WorkerError, match="100 tokens of 1 sequences"):
        Worker(work, replace(SETTINGS, batched_tokens=64)).begin(scheduler, orders)
