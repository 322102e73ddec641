"""Victims, groups, caps, the gate: each rule by what it promises."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sched_requests import Ask, Known, of, policy

from vllm_dler.gate import peak, places

LENGTHS = {"class:short": 20.0, "class:long": 1000.0}


# -- victims


def running(one: Any, *asks: Ask) -> list[Ask]:
    for ask in asks:
        one.arrived(ask, 0)
    one.admitted([ask.request_id for ask in asks])
    return list(asks)


def test_who_has_most_to_come_for_what_is_lost_gives_way() -> None:
    one = policy(lengths=Known(LENGTHS))
    fresh = of("long", num_prompt_tokens=100)
    old = of("long", num_prompt_tokens=100, num_output_tokens=900)
    short = of("short", num_prompt_tokens=100)
    dear = of("long", num_prompt_tokens=5000)
    asks = running(one, fresh, old, short, dear)
    one.sort_running(asks)
    # 100 / 1001, 20 / 101, 1000 / 5001, 1000 / 101
    assert asks == [old, short, dear, fresh]


def test_who_gave_way_too_often_stays() -> None:
    one = policy({"victims": {"max_evictions": 2}}, Known(LENGTHS))
    often, never = of("long"), of("short")
    asks = running(one, often, never)
    for _ in range(2):
        one.sort_running(asks)
        assert asks[-1] is often
        one.evicted(often, "kv_full")
        one.evicted(never, "reset")  # which is nobody's choice, and does not count
    one.sort_running(asks)
    assert asks[-1] is never
    one.evicted(never, "kv_full")
    one.evicted(never, "kv_full")
    one.sort_running(asks)  # somebody has to
    assert asks[-1] is often


def test_who_has_just_begun_stays_longer_each_time() -> None:
    one = policy({"victims": {"min_run": 10, "growth": 3}}, Known(LENGTHS))
    new, other = of("long"), of("short", num_output_tokens=10)
    asks = running(one, new, other)
    for least in (10, 30, 90):
        new.num_output_tokens += least - 1
        one.sort_running(asks)
        assert asks[-1] is other, least
        new.num_output_tokens += 1
        one.sort_running(asks)
        assert asks[-1] is new, least
        one.evicted(new, "kv_full")


def test_the_users_priority_decides_first_who_gives_way() -> None:
    one = policy(lengths=Known(LENGTHS), by_priority=True)
    asks = running(one, of("long", priority=0), of("short", priority=5), of("long", priority=1))
    kept = list(asks)
    one.sort_running(asks)
    assert asks == [kept[0], kept[2], kept[1]]


def test_a_running_request_is_estimated_anew_as_it_grows() -> None:
    one = policy(lengths=Known({"class:a": 100.0, "class:b": 100.0}))
    first, second = of("a"), of("b")
    asks = running(one, first, second)
    one.sort_running(asks)
    first.num_output_tokens, second.num_output_tokens = 90, 3
    one.sort_running(asks)
    assert asks == [first, second]
    first.num_output_tokens, second.num_output_tokens = 91, 99
    one.sort_running(asks)
    assert asks == [second, first]


def test_evictions_that_nobody_foresaw_are_told_apart() -> None:
    one = policy(lengths=Known(LENGTHS))
    asks = running(one, of("long"), of("short"))
    one.begin_step()
    one.evicted(asks[0], "kv_full")
    one.begin_step()
    one.sort_running(asks)
    one.evicted(asks[1], "kv_full")
    one.begin_step()
    one.evicted(asks[0], "reset")
    found = {labels[0]: value for labels, value in one.report()["counters"]["evictions"]}
    assert found == {"unforeseen": 1, "kv_full": 1, "reset": 1}


def test_an_admission_leaves_room_for_what_runs() -> None:
    one = policy({"headroom_tokens": 64}, Known(LENGTHS))
    short, long, last = of("short"), of("long"), of("long", max_tokens=1)
    running(one, short, long, last, Ask(max_tokens=30))
    assert one.headroom == 2 + 64 + 1 + 16
    one.admitted([long.request_id])  # again, as after an eviction that was none
    assert one.headroom == 83
    one.evicted(long, "kv_full")
    assert one.headroom == 19
    long.num_output_tokens = 990
    one.admitted([long.request_id])
    assert one.headroom == 20
    for ask in (short, long, last):
        one.finished(ask, "abort")
    assert one.headroom == 16
    off = policy({"kappa": 0}, Known(LENGTHS))
    running(off, of("long"))
    assert off.headroom == 0


# -- groups


def samples(count: int, parent: str = "p-1", name: str = "long", **options: Any) -> list[Ask]:
    return [of(name, 900.0, request_id=f"{n}_{parent}", **options) for n in range(count)]


def test_one_sample_starts_early_and_the_others_share_a_deadline() -> None:
    one = policy(lengths=Known(LENGTHS))
    group, alone = samples(3), of("long", 900.0)
    states = [one.arrived(ask, 0) for ask in (*group, alone)]
    probe, second, third, other = states
    assert probe.deadline == pytest.approx(900 + 0.02 * 0.5 * 1002.5)
    assert second.deadline == third.deadline == other.deadline == pytest.approx(900 + 0.02 * 1002.5)


def test_a_probe_of_1_is_none() -> None:
    one = policy({"groups": {"probe": 1.0}}, Known(LENGTHS))
    assert len({one.arrived(ask, 0).deadline for ask in samples(3)}) == 1
    off = policy({"groups": {"enabled": False}}, Known(LENGTHS))
    assert len({off.arrived(ask, 0).deadline for ask in samples(3)}) == 1


def test_of_samples_that_differ_the_longest_goes_first_but_none_before_its_arrival() -> None:
    one = policy({"groups": {"probe": 1.0}}, Known(LENGTHS))
    queue = one.queue()
    asks = [
        Ask(900.0, xargs={"dler_class": "short", "dler_group": "g"}),
        Ask(900.0, xargs={"dler_class": "long", "dler_group": "g"}),
        Ask(950.0, xargs={"dler_class": "long", "dler_group": "g"}),
        Ask(940.0, xargs={"dler_class": "short"}),
    ]
    for ask in (asks[0], asks[1], asks[3], asks[2]):
        one.arrived(ask, 0)
        queue.add_request(ask)
    one.begin_step()
    assert list(queue) == [asks[1], asks[0], asks[3], asks[2]]
    assert one.tracked(asks[2]).deadline == 950.0


def test_a_member_that_lowers_the_deadline_lowers_it_for_those_that_wait() -> None:
    one = policy({"groups": {"probe": 1.0}}, Known(LENGTHS))
    queue = one.queue()
    long, other, short = (
        Ask(900.0, xargs={"dler_class": "long", "dler_group": "g"}),
        of("long", 900.0, num_prompt_tokens=0),
        Ask(901.0, xargs={"dler_class": "short", "dler_group": "g"}),
    )
    for ask in (long, other):
        one.arrived(ask, 0)
        queue.add_request(ask)
    one.begin_step()
    assert list(queue) == [other, long]
    one.arrived(short, 0)
    queue.add_request(short)
    one.begin_step()
    assert list(queue) == [long, short, other]


def test_enough_samples_end_the_others_once() -> None:
    one = policy(lengths=Known(LENGTHS))
    asks = samples(4)
    for ask in asks:
        assert ask.sampling_params is not None
        ask.sampling_params.extra_args = {"dler_class": "long", "dler_stop_after": 2}
        one.arrived(ask, 0)
    asks[0].num_output_tokens = 5
    one.finished(asks[0], "stop")
    assert one.take_stops() == []
    one.finished(asks[1], "abort")
    assert one.take_stops() == []
    asks[2].num_output_tokens = 9
    one.finished(asks[2], "stop")
    assert one.take_stops() == [asks[3].request_id]
    assert one.take_stops() == []
    one.finished(asks[3], "length")
    assert (len(one.placement.groups), len(one._states)) == (0, 0)
    assert one.report()["counters"]["group_stops"] == [[[], 1.0]]


def test_who_must_not_stop_early_says_so() -> None:
    one = policy({"groups": {"stop_after": False}}, Known(LENGTHS))
    asks = [Ask(request_id=f"{n}_q", xargs={"dler_stop_after": 1}) for n in range(2)]
    for ask in asks:
        one.arrived(ask, 0)
    asks[0].num_output_tokens = 3
    one.finished(asks[0], "stop")
    assert one.take_stops() == []


def test_samples_that_ended_refine_the_others() -> None:
    """The real estimator: all knew 1000 tokens, and two samples took 30."""
    one = policy({"relearn_every": 10_000, "relearn_s": 1e9})
    for _ in range(300):
        one.lengths.observe(["class:long"], 1000)
        one.lengths.observe(["class:long"], 30)
    asks = samples(4)
    states = [one.arrived(ask, 0) for ask in asks]
    queue = one.queue()
    queue.add_request(asks[3])
    before = states[3].deadline
    for ask in asks[:2]:
        ask.num_output_tokens = 30
        one.finished(ask, "stop")
    one.begin_step()
    assert states[3].deadline < before - 0.02 * 100


# -- caps and arguments


def test_a_cap_shortens_its_class_only() -> None:
    one = policy({"caps": {"chat": 50, "*": 200}})
    asks = {name: of(name, max_tokens=100) for name in ("chat", "other")}
    asks["long"] = Ask(max_tokens=1000)
    for ask in asks.values():
        one.arrived(ask, 0)
    assert {name: ask.max_tokens for name, ask in asks.items()} == {"chat": 50, "other": 100, "long": 200}
    for ask in asks.values():
        ask.num_output_tokens = ask.max_tokens
        one.finished(ask, "length")
    assert one.report()["counters"]["caps"] == [[["chat"], 1.0], [["default"], 1.0]]


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", [1]])
def test_arguments_that_make_no_sense_are_counted_and_ignored(value: Any) -> None:
    one = policy()
    one.arrived(Ask(xargs={"dler_stop_after": value, "dler_class": "x" * 200, "dler_group": 2.0}), 0)
    rows = {labels[0]: count for labels, count in one.report()["counters"]["refused_arguments"]}
    assert rows == {"dler_stop_after": 1, "dler_class": 1, "dler_group": 1}


def test_clients_cannot_make_labels_without_end() -> None:
    one = policy({"classes": {"max_labels": 2}})
    assert [one.arrived(of(name), 0).label for name in "abcb"] == ["a", "b", "other", "b"]
    assert one.arrived(Ask(), 0).label == "default"


def test_classes_from_the_most_specific_to_the_least() -> None:
    one = policy({"classes": {"prefix_tokens": 4, "same_prompt": True}})

    class Lora:
        lora_name = "l"

    same = {"prompt_token_ids": [1, 2, 3, 4, 5], "num_prompt_tokens": 5}
    ask = of("c", session_id="s", lora_request=Lora(), cache_salt="secret", **same)
    keys = one.arrived(ask, 0).keys
    kinds = [key.partition(":")[0] for key in keys]
    assert kinds == ["same", "class", "class", "session", "lora", "salt", "prefix", "prompt"]
    assert keys[1:3] == ("class:c|prompt:4|sampled", "class:c")
    assert "secret" not in "".join(keys)
    assert keys[-1] == "prompt:4|sampled"
    other = one.arrived(Ask(prompt_token_ids=[1, 2, 3, 4, 9, 9], num_prompt_tokens=6), 0).keys
    assert other == (other[0], keys[-2], "prompt:5|sampled")
    assert one.arrived(Ask(prompt_token_ids=[1, 2], num_prompt_tokens=2), 0).keys[-1] == "prompt:2|sampled"


@pytest.mark.parametrize("end", ["length", "abort", "repetition"])
def test_only_an_answer_that_ended_by_itself_tells_its_length(end: Any) -> None:
    known = Known({})
    one = policy(lengths=known)
    asks = [of("a", num_output_tokens=4), of("a", num_output_tokens=5), of("a"), of("a", num_output_tokens=6)]
    asks.append(of("a", num_output_tokens=1, kv_transfer_params={"do_remote_decode": True}))
    for ask, how in zip(asks, ("stop", end, "stop", "error", "length"), strict=True):
        one.arrived(ask, 0)
        one.finished(ask, how)  # type: ignore[arg-type]
    assert [(tokens, censored) for _, tokens, censored in known.seen] == [(4, False), (5, True)]


# -- the gate


def brute(requests: list[tuple[int, int]]) -> int:
    """Tokens held in each step, counted one by one; a request is gone in the step after its last token."""
    last = max(rest for rest, _ in requests)
    return max(sum(now + step for rest, now in requests if rest >= step) for step in range(last + 1))


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 80)), min_size=1, max_size=9))
def test_the_peak_is_that_of_a_step_by_step_count(requests: list[tuple[int, int]]) -> None:
    assert peak(requests) == brute(requests)


def test_the_gate_never_leaves_an_engine_idle() -> None:
    assert places([], [(10_000.0, 500)], 100) == 1
    assert places([], [(10_000.0, 500), (1.0, 1)], 100) == 1
    assert places([(10.0, 50)], [(1000.0, 40)], 100) == 0
    assert places([(10.0, 50)], [(5.0, 20), (5.0, 10), (90.0, 90)], 110) == 2


def test_the_policy_gates_by_what_it_expects() -> None:
    one = policy({"gate": {"enabled": True, "usage": 1.0}}, Known(LENGTHS))
    queue = one.queue()
    assert one.gates
    asks = running(one, of("long", num_prompt_tokens=0, num_output_tokens=500))
    for _ in range(3):
        ask = of("short", num_prompt_tokens=10)
        one.arrived(ask, 0)
        queue.add_request(ask)
    # After 20 steps: 520 of the long one and 30 of each short one; at its end the long one has 1000.
    assert one.places(asks, queue, 1000) == 3
    assert one.places(asks, queue, 999) == 0
    assert one.report()["counters"]["gate_closed_steps"] == [[[], 1.0]]
