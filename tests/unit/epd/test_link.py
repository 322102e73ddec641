"""The control link over its real socket."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vllm_epd.config import ConfigError
from vllm_epd.link import SchedulerEnd, WorkerEnd, link_name
from vllm_epd.messages import Counters, Drop, Fetch, Saved, Serving, ToWorker


def until(happened: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def saved(number: int, size: int = 10) -> Saved:
    return Saved(f"i{number}" + "x" * size, "", f"item-{number}", 16, 4096)


class Pair:
    """One scheduler and two workers."""

    def __init__(self) -> None:
        self.heard: list[tuple[int, ToWorker]] = []
        engine = secrets.token_hex(8)
        names = [link_name(engine, 0, rank) for rank in range(2)]
        self.workers = [
            WorkerEnd(
                name, lambda message, rank=rank: self.heard.append((rank, message)), [Serving("e", "x", "h", rank)]
            )
            for rank, name in enumerate(names)
        ]
        self.names = names
        self.scheduler = SchedulerEnd(names)

    def receive(self, count: int) -> list[tuple[int, Any]]:
        got: list[tuple[int, Any]] = []
        until(lambda: got.extend(self.scheduler.receive()) or len(got) >= count)
        return got

    def close(self) -> None:
        self.scheduler.close()
        for worker in self.workers:
            worker.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_messages_both_ways(pair: Pair) -> None:
    assert sorted(pair.receive(2)) == [(0, Serving("e", "x", "h", 0)), (1, Serving("e", "x", "h", 1))]
    pair.workers[1].send([saved(1), Counters({"a": {"b": 1.0}}, {})])
    assert pair.receive(2) == [(1, saved(1)), (1, Counters({"a": {"b": 1.0}}, {}))]
    order = Fetch(1, "i", None, None, 16, 64, 0.0, 1.0)
    pair.scheduler.send(order, Drop((1, 2)))
    until(lambda: len(pair.heard) == 4)
    assert sorted(rank for rank, _ in pair.heard) == [0, 0, 1, 1]
    assert [message for rank, message in pair.heard if rank == 0] == [order, Drop((1, 2))]


def test_what_a_worker_sent_is_there_when_its_step_ends(pair: Pair) -> None:
    """No wait between the sending and the receiving: that is what a step's output relies on."""
    pair.receive(2)
    for number in range(200):
        pair.workers[0].send([saved(number)])
        assert pair.scheduler.receive() == [(0, saved(number))]


def test_more_than_the_socket_holds_comes_whole_and_in_order(pair: Pair) -> None:
    pair.receive(2)
    for number in range(3000):
        pair.workers[0].send([saved(number, 500)])
    assert [message for _, message in pair.receive(3000)] == [saved(number, 500) for number in range(3000)]
    pair.workers[0].send([saved(number, 500) for number in range(1000)])
    assert len(pair.receive(1000)) == 1000


def test_a_message_before_the_scheduler_is_there() -> None:
    name = link_name(secrets.token_hex(8), 0, 0)
    worker = WorkerEnd(name, lambda message: None, [Serving("e", "x", "h", 1)])
    worker.send([saved(1)])
    scheduler = SchedulerEnd([name])
    try:
        got: list[Any] = []
        until(lambda: got.extend(scheduler.receive()) or len(got) == 2)
        assert [message for _, message in got] == [Serving("e", "x", "h", 1), saved(1)]
    finally:
        scheduler.close()
        worker.close()


def test_the_engine_is_woken(pair: Pair) -> None:
    pair.receive(2)
    woken = threading.Event()
    pair.scheduler.set_wake(woken.set)
    assert not pair.scheduler.arrived()
    pair.workers[1].send([saved(1)])
    assert woken.wait(20)
    assert pair.scheduler.arrived()
    assert pair.receive(1) == [(1, saved(1))]
    assert not pair.scheduler.arrived()
    woken.clear()
    pair.workers[0].send([saved(2)])
    assert woken.wait(20)


def test_an_order_that_fails_does_not_end_the_link() -> None:
    heard: list[ToWorker] = []

    def once(message: ToWorker) -> None:
        heard.append(message)
        if len(heard) == 1:
            raise RuntimeError("no")

    name = link_name(secrets.token_hex(8), 0, 0)
    worker = WorkerEnd(name, once)
    scheduler = SchedulerEnd([name])
    try:
        scheduler.send(Drop((1,)))
        until(lambda: len(heard) == 1)
        scheduler.send(Drop((2,)))
        until(lambda: len(heard) == 2)
    finally:
        scheduler.close()
        worker.close()


def test_a_worker_that_is_gone(pair: Pair) -> None:
    pair.receive(2)
    pair.workers[0].close()
    until(lambda: pair.scheduler.receive() or pair.scheduler.broken)
    pair.scheduler.send(Drop((1,)))
    until(lambda: len(pair.heard) == 1)
    assert pair.heard == [(1, Drop((1,)))]


def test_no_worker_on_this_host() -> None:
    with pytest.raises(ConfigError, match="all workers of one engine on the scheduler's host"):
        SchedulerEnd([link_name("nobody", 0, 0)])


def test_two_workers_cannot_have_one_name(pair: Pair) -> None:
    with pytest.raises(OSError, match="in use"):
        WorkerEnd(pair.names[0], lambda message: None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_refused() -> None:
    name = link_name(secrets.token_hex(8), 0, 0)
    worker = WorkerEnd(name, lambda message: None, [Serving("e", "x", "h", 1)])
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            SchedulerEnd([name])
        except ConfigError:
            os._exit(3)
        os._exit(0)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        scheduler = SchedulerEnd([name])  # the right one is served afterwards
        got: list[Any] = []
        until(lambda: got.extend(scheduler.receive()) or got)
        scheduler.close()
    finally:
        worker.close()
