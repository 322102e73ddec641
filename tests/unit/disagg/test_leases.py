"""The book of leases under every order of events: a granted claim is never broken early, and no lease is for ever."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from vllm_disagg.leases import REMEMBER_ENDED, End, LeaseBook
from vllm_suite.handoff import VERSION, Handoff, Refusal

LEASE_S, MAX_HOLD_S = 10.0, 100.0


def reference(request_id: str = "r", **changes: Any) -> Handoff:
    fields: dict[str, Any] = {
        "version": VERSION,
        "producer": "p",
        "epoch": "e",
        "request_id": request_id,
        "content": "c",
        "model": "m",
        "layout": "l",
        "tokens": 10,
        "location": "here",
        "claim_host": "127.0.0.1",
        "claim_port": 1,
        "lease_s": LEASE_S,
    }
    return Handoff(**{**fields, **changes})


def book() -> LeaseBook:
    return LeaseBook("p", "e", MAX_HOLD_S)


def test_refusals_by_reason() -> None:
    b = book()
    b.issue(reference(), 0.0)
    assert b.claim(reference(producer="q"), "h", 5, 1.0) is Refusal.FOREIGN_PRODUCER
    assert b.claim(reference(epoch="f"), "h", 5, 1.0) is Refusal.STALE_EPOCH
    assert b.claim(reference("other"), "h", 5, 1.0) is Refusal.UNKNOWN
    assert b.claim(reference(location="there"), "h", 5, 1.0) is Refusal.TAMPERED
    assert b.claim(reference(), "h", 5, LEASE_S) is Refusal.EXPIRED
    assert b.claim(reference(), "h", 5, 1.0) == LEASE_S - 1.0
    assert b.claim(reference(), "h", 20, 1.0) == 20.0, "the same nonce again is the same message again"
    assert b.claim(reference(), "other", 5, 1.0) is Refusal.REUSED


@given(st.sampled_from([f for f in Handoff.__struct_fields__ if f != "mac"]))
def test_every_field_is_compared(name: str) -> None:
    b = book()
    good = reference()
    b.issue(good, 0.0)
    value = getattr(good, name)
    changed = reference(**{name: value + 1 if isinstance(value, int | float) else value + "x"})
    assert isinstance(b.claim(changed, "h", 5, 1.0), Refusal)


def test_ended_references_are_remembered_and_memory_is_bounded() -> None:
    b = book()
    for i in range(REMEMBER_ENDED + 10):
        b.issue(reference(str(i)), 0.0)
        assert b.freed(str(i), 1.0) is not None
    assert b.claim(reference(str(REMEMBER_ENDED + 9)), "h", 5, 1.0) is Refusal.REUSED
    assert b.claim(reference("0"), "h", 5, 1.0) is Refusal.UNKNOWN
    assert len(b._ended) == REMEMBER_ENDED


def test_renewal_stops_at_the_longest_hold() -> None:
    b = book()
    b.issue(reference(), 0.0)
    b.claim(reference(), "h", 20, 0.0)
    now = 0.0
    while not isinstance(b.renew("r", "h", 20, now), Refusal):
        now += 10
    assert now == MAX_HOLD_S


class LeaseLife(RuleBasedStateMachine):
    """Random issue, claim, renew, release, expiry and free, with a clock; a model keeps what was promised."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.book = book()
        self.now = 0.0
        self.count = 0
        self.promised: dict[str, tuple[str, float]] = {}  # request -> holder, until when
        self.ordered_to_end: dict[str, End] = {}
        self.live: set[str] = set()

    @rule(target=requests)
    def issue(self) -> str:
        self.count += 1
        request_id = str(self.count)
        self.book.issue(reference(request_id), self.now)
        self.live.add(request_id)
        return request_id

    @rule(seconds=st.floats(0.1, 30))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(request_id=requests, holder=st.sampled_from("ab"), hold=st.floats(0.1, 50))
    def claim(self, request_id: str, holder: str, hold: float) -> None:
        outcome = self.book.claim(reference(request_id), holder, hold, self.now)
        if isinstance(outcome, Refusal):
            return
        assert request_id in self.live, "granted a lease whose blocks are free"
        assert request_id not in self.ordered_to_end, "granted a lease the workers were told to end"
        held_by = self.promised.get(request_id, (holder, 0.0))[0]
        assert held_by == holder, "granted to two"
        self.promised[request_id] = (holder, self.now + outcome)

    @rule(request_id=requests, holder=st.sampled_from("ab"), hold=st.floats(0.1, 50))
    def renew(self, request_id: str, holder: str, hold: float) -> None:
        outcome = self.book.renew(request_id, holder, hold, self.now)
        if not isinstance(outcome, Refusal):
            assert self.promised[request_id][0] == holder
            self.promised[request_id] = (holder, self.now + outcome)

    @rule(request_id=requests, holder=st.sampled_from("ab"))
    def release(self, request_id: str, holder: str) -> None:
        if self.book.release(request_id, holder):
            assert self.promised.pop(request_id)[0] == holder

    @rule()
    def step(self) -> None:
        """What the scheduler does each step."""
        self.book.expire(self.now)
        for request_id, end in self.book.take_ended().items():
            holder_and_until = self.promised.pop(request_id, None)
            if holder_and_until is not None:
                assert end is End.EXPIRED
                assert self.now >= holder_and_until[1], "a promise was broken"
            self.ordered_to_end[request_id] = end

    @precondition(lambda self: self.ordered_to_end)
    @rule()
    def free_ordered(self) -> None:
        request_id, end = self.ordered_to_end.popitem()
        ended = self.book.freed(request_id, self.now)
        assert ended is not None
        assert ended.end is end
        self.live.discard(request_id)

    @rule(request_id=requests)
    def pulled(self, request_id: str) -> None:
        """NIXL's notice came: the blocks are free whatever the book thought."""
        ended = self.book.freed(request_id, self.now)
        assert (ended is not None) == (request_id in self.live)
        self.live.discard(request_id)
        self.promised.pop(request_id, None)
        self.ordered_to_end.pop(request_id, None)

    @invariant()
    def count_agrees(self) -> None:
        assert len(self.book) == len(self.live)

    def teardown(self) -> None:
        self.now += MAX_HOLD_S + 1
        self.step()
        while self.ordered_to_end:
            self.free_ordered()
        assert len(self.book) == 0, "a lease for ever"


LeaseLife.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestLeaseLife = LeaseLife.TestCase
