"""Claims against a real lease server over a real socket, and against producers that misbehave."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.unit.disagg.test_leases import reference
from vllm_disagg.claims import Claims, ClaimState
from vllm_disagg.config import ConfigError, DisaggConfig
from vllm_disagg.lease_server import LeaseServer
from vllm_disagg.leases import LeaseBook
from vllm_suite.handoff import Handoff, Refusal
from vllm_suite.loop_thread import LoopThread, bind

CONFIG = DisaggConfig(claim_timeout_s=0.3, pull_timeout_s=0.8, lease_s=5, peer_retry_s=1.0, peer_retry_max_s=1.5)


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    loop = LoopThread("test")
    yield loop
    loop.stop()


@pytest.fixture
def claims(thread: LoopThread) -> Iterator[Claims]:
    made = Claims(CONFIG, thread, "d")
    yield made
    made.close()


class Producer:
    def __init__(self, thread: LoopThread) -> None:
        self.book = LeaseBook("p", "e", 60.0)
        self.events = threading.Event()
        self.server = LeaseServer(self.book, thread, "127.0.0.1", 0, self.events.set)

    def issue(self, request_id: str) -> Handoff:
        ref = reference(request_id, claim_port=self.server.port, lease_s=1.0)
        self.book.issue(ref, time.monotonic())
        return ref


@pytest.fixture
def producer(thread: LoopThread) -> Producer:
    return Producer(thread)


def answered(claims: Claims, request_id: str) -> ClaimState:
    claim = claims.get(request_id)
    assert claim is not None
    assert claim.answered.wait(2)
    return claim


def pending(listening: socket.socket) -> int:
    """Connections nobody accepted yet."""
    for count in itertools.count():
        try:
            listening.accept()[0].close()
        except BlockingIOError:
            return count
    raise AssertionError


def test_a_granted_claim_is_surely_held_until_it_says(claims: Claims, producer: Producer) -> None:
    claims.start("mine", producer.issue("r"))
    claim = answered(claims, "mine")
    assert claim.refusal is None
    lease = producer.book._leases["r"]
    assert lease.consumer == "d"
    assert claim.until < lease.until, "the consumer's clock must run out first"


def test_claims_are_renewed_until_finished(claims: Claims, producer: Producer) -> None:
    claims.start("mine", producer.issue("r"))
    first = answered(claims, "mine").until
    time.sleep(CONFIG.hold_s + 1)
    claim = claims.get("mine")
    assert claim is not None
    assert claim.refusal is None
    assert claim.until > first + 1
    claims.finish("mine", pulled=False)
    assert producer.events.wait(1)
    assert producer.book.take_ended() == {"r": "released"}


def test_a_claim_given_up_before_its_answer_is_released(claims: Claims, producer: Producer) -> None:
    ref = producer.issue("r")
    claims.start("mine", ref)
    claims.finish("mine", pulled=False)
    deadline = time.monotonic() + 2
    while "r" not in producer.book.take_ended():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_knows_when_nobody_talks(claims: Claims, producer: Producer) -> None:
    with bind("127.0.0.1", 0, "test") as silent:  # a producer that answers may have done so already
        claims.start("mine", reference(claim_port=silent.getsockname()[1]))
        assert claims.talking
        answered(claims, "mine")
    claims.finish("mine", pulled=False)
    claims.start("gone", producer.issue("s"))
    claims.finish("gone", pulled=False)
    deadline = time.monotonic() + 2
    while claims.talking:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(CONFIG.renew_s * 2)
    assert not claims.talking


def test_the_producer_hears_that_a_pull_begins(claims: Claims, producer: Producer) -> None:
    claims.start("mine", producer.issue("r"))
    answered(claims, "mine")
    assert not producer.book.being_read()
    claims.begin("mine")
    assert producer.events.wait(1)
    assert producer.book.being_read()
    producer.book.freed("r", time.monotonic())
    assert not producer.book.being_read()


def test_many_claims_share_one_connection(claims: Claims, producer: Producer) -> None:
    for i in range(200):
        claims.start(str(i), producer.issue(str(i)))
    assert all(answered(claims, str(i)).refusal is None for i in range(200))
    assert len(claims._peers) == 1
    assert not claims.talking


def test_a_closed_port_is_a_dead_peer_at_once_and_is_remembered(claims: Claims) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    for name in ("first", "second"):
        claims.start(name, reference(name, claim_port=port))
        assert answered(claims, name).refusal is Refusal.PEER_DEAD, "a timeout would be another refusal"


def test_a_host_that_can_be_none_is_a_dead_peer(claims: Claims) -> None:
    """A label of more than 63 characters: the codec for names raises a UnicodeError. Without an answer the request
    would wait for ever."""
    claims.start("one", reference("one", claim_host="x" * 70, claim_port=1))
    assert answered(claims, "one").refusal is Refusal.PEER_DEAD


def test_a_silent_producer_costs_one_deadline_then_nothing_then_is_asked_again(claims: Claims) -> None:
    with bind("127.0.0.1", 0, "test") as silent:
        silent.setblocking(False)
        ref = reference(claim_port=silent.getsockname()[1])
        begun = time.monotonic()
        for name, refusal, connections in (("first", Refusal.CLAIM_TIMEOUT, 1), ("second", Refusal.PEER_DEAD, 0)):
            claims.start(name, ref)
            assert answered(claims, name).refusal is refusal
            assert pending(silent) == connections
        assert time.monotonic() - begun < CONFIG.claim_timeout_s + CONFIG.peer_retry_s, "the pause was over"
        time.sleep(CONFIG.peer_retry_max_s)
        claims.start("later", ref)
        assert answered(claims, "later").refusal is Refusal.CLAIM_TIMEOUT
        assert pending(silent) == 1


def test_a_restarted_producer_is_another_peer(claims: Claims, producer: Producer) -> None:
    old = reference("old", claim_port=producer.server.port, epoch="before")
    claims.start("old", old)
    assert answered(claims, "old").refusal is Refusal.STALE_EPOCH
    claims.start("new", producer.issue("new"))
    assert answered(claims, "new").refusal is None


@pytest.mark.parametrize("junk", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", b"HTTP/1.1 400\r\n\r\n"])
def test_a_peer_that_answers_nonsense(claims: Claims, junk: bytes) -> None:
    with bind("127.0.0.1", 0, "test") as sock:

        def answer() -> None:
            connection, _ = sock.accept()
            connection.recv(4096)
            connection.sendall(junk)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        claims.start("mine", reference(claim_port=sock.getsockname()[1]))
        assert answered(claims, "mine").refusal is Refusal.PEER_DEAD
        thread.join(2)


def test_a_lost_lease_is_noticed(claims: Claims, producer: Producer) -> None:
    claims.start("mine", producer.issue("r"))
    answered(claims, "mine")
    producer.book.freed("r", time.monotonic())
    time.sleep(CONFIG.renew_s + 0.3)
    claim = claims.get("mine")
    assert claim is not None
    assert claim.refusal is Refusal.LEASE_LOST


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"suite": {"lease": 3}}, "suite.lease"),
        ({"suite": {"lease_s": -1}}, "suite.lease_s"),
        ({"suite": {"claim_timeout_s": 20}}, "claim_timeout_s"),
        ({"typo": 1}, "typo"),
        ({"bidirectional_kv_xfer": True}, "bidirectional_kv_xfer"),
    ],
)
def test_bad_settings_are_named(extra: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        DisaggConfig.from_extra_config(extra)


def test_vllms_lease_setting_is_honoured() -> None:
    assert DisaggConfig.from_extra_config({"kv_lease_duration": 7}).lease_s == 7
    assert DisaggConfig.from_extra_config({"kv_lease_duration": 7, "suite": {"lease_s": 9}}).lease_s == 9
