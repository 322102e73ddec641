"""What the consumer's scheduler knows of items: one attempt per item, refusals by source, nothing left behind."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vllm_epd.ledger import Item, Ledger
from vllm_suite.handoff import Refusal

RANKS = frozenset({0, 1})


def started(ledger: Ledger, request: str = "r", item: str = "i", source: str = "s", until: float = 10.0) -> Item:
    return ledger.start(request, item, source, 16, until, False)


def test_an_item_is_ready_when_every_rank_has_it() -> None:
    ledger = Ledger(RANKS)
    item = started(ledger)
    assert ledger.fetching
    assert ledger.answered(0, item.ticket, None, 100, 0.1, "e") is None
    assert not ledger.ready("i")
    settled = ledger.answered(1, item.ticket, None, 100, 0.3, "e")
    assert settled is not None
    assert settled.refusal is None
    assert (item.size, item.seconds, item.producer) == (200, 0.3, "e")
    assert ledger.ready("i")
    assert not ledger.fetching
    assert ledger.take("i") is item
    assert len(ledger) == 0


def test_one_rank_that_fails_fails_the_item() -> None:
    ledger = Ledger(RANKS)
    item = started(ledger)
    ledger.answered(0, item.ticket, None)
    settled = ledger.answered(1, item.ticket, Refusal.BAD_CHECKSUM)
    assert settled is not None
    assert settled.refusal is Refusal.BAD_CHECKSUM
    assert ledger.refusal("r", "i") is Refusal.BAD_CHECKSUM
    assert ledger.get("i") is None
    assert ledger.answered(1, item.ticket, None) is None


def test_an_answer_of_an_earlier_attempt_or_given_twice_changes_nothing() -> None:
    ledger = Ledger(RANKS)
    old = started(ledger).ticket
    assert ledger.leave("r") == [old]
    new = started(ledger)
    assert ledger.answered(0, old, Refusal.EXPIRED) is None
    assert ledger.answered(0, new.ticket, None) is None
    assert ledger.answered(0, new.ticket, Refusal.EXPIRED) is None
    assert new.missing == {1}


def test_a_failure_belongs_to_those_who_named_the_same_source() -> None:
    ledger = Ledger(frozenset({0}))
    item = started(ledger, "bad", source="wrong")
    ledger.join("same", item, "wrong")
    ledger.join("none", item, "")
    ledger.join("good", item, "right")
    ledger.answered(0, item.ticket, Refusal.STALE_EPOCH)
    refused = {request: ledger.refusal(request, "i") for request in ("bad", "same", "none", "good")}
    assert refused == dict.fromkeys(("bad", "same", "none"), Refusal.STALE_EPOCH) | {"good": None}
    again = started(ledger, "good", source="right")
    assert ledger.answered(0, again.ticket, None) is not None
    assert ledger.ready("i")


def test_an_attempt_ends_with_the_last_who_wants_it() -> None:
    ledger = Ledger(RANKS)
    item = started(ledger, "one")
    ledger.join("two", item, "s")
    assert ledger.leave("one") == []
    assert ledger.leave("two") == [item.ticket]
    assert ledger.leave("two") == []
    assert ledger.get("i") is None


def test_a_request_that_leaves_takes_its_refusals_along() -> None:
    ledger = Ledger(RANKS)
    ledger.refuse("r", "i", Refusal.MALFORMED)
    ledger.leave("r")
    assert ledger.refusal("r", "i") is None


def test_ranks_that_say_nothing_are_given_up() -> None:
    ledger = Ledger(RANKS)
    late, early = started(ledger, item="late", until=5.0), started(ledger, item="early", until=9.0)
    ready = started(ledger, item="ready", until=1.0)
    for rank in RANKS:
        ledger.answered(rank, ready.ticket, None)
    ledger.answered(0, late.ticket, None)
    assert ledger.next_deadline() == 5.0
    assert [settled.item for settled in ledger.overdue(6.0)] == [late]
    assert ledger.refusal("r", "late") is Refusal.READ_FAILED
    assert ledger.get("early") is early
    assert ledger.ready("ready")
    assert {settled.item.identifier for settled in ledger.fail_all()} == {"early", "ready"}
    assert len(ledger) == 0


_steps = st.lists(
    st.tuples(st.sampled_from(["want", "leave", "ok", "fail", "take", "late"]), st.integers(0, 2), st.integers(0, 2)),
    max_size=60,
)


@given(_steps)
def test_nothing_is_left_behind(steps: list[tuple[str, int, int]]) -> None:
    """Whatever happens: an open attempt is wanted by somebody, its ticket is known, and in the end all is gone."""
    ledger = Ledger(RANKS)
    open_tickets: set[int] = set()
    for kind, a, b in steps:
        request, identifier = f"r{a}", f"i{b}"
        item = ledger.get(identifier)
        if kind == "want" and ledger.refusal(request, identifier) is None:
            if item is None:
                open_tickets.add(ledger.start(request, identifier, f"s{a}", 1, float(b), False).ticket)
            else:
                ledger.join(request, item, f"s{a}")
        elif kind == "leave":
            open_tickets.difference_update(ledger.leave(request))
        elif kind in ("ok", "fail") and item is not None:
            settled = ledger.answered(a, item.ticket, None if kind == "ok" else Refusal.EXPIRED)
            if settled is not None and settled.refusal is not None:
                open_tickets.discard(item.ticket)
        elif kind == "take" and ledger.ready(identifier):
            open_tickets.discard(ledger.take(identifier).ticket)
        elif kind == "late":
            open_tickets.difference_update(settled.item.ticket for settled in ledger.overdue(float(b)))
        known = [ledger.get(f"i{n}") for n in range(3)]
        assert {item.ticket for item in known if item is not None} == open_tickets
        assert all(item.wanted_by for item in known if item is not None)
        assert all(ledger.refusal(r, i.identifier) is None for i in known if i is not None for r in i.wanted_by)
    for n in range(3):
        ledger.leave(f"r{n}")
    assert len(ledger) == 0
    assert not ledger._wants
    assert not ledger._refused
