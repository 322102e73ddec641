"""The pool against a plain model of it, in any order of calls.

With one tier the model says exactly what is kept and what is refused; with two it says what must hold of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_epd.checksum import checksum
from vllm_epd.pool import Pool, Stored
from vllm_epd.tiers import new_slab
from vllm_suite.handoff import Refusal

BLOCK = 64
LEASE_S = 2.0
NAMES = st.sampled_from("abcdef")
WORDS = BLOCK // 4


@dataclass
class Known:
    """One publication, as the model sees it."""

    stored: Stored
    content: torch.Tensor
    blocks: int
    until: float
    used: int
    read: bool = False
    listed: bool = True
    pins: dict[int, float] = field(default_factory=dict)


class PoolMachine(RuleBasedStateMachine):
    host_blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.turn = 0
        self.all: list[Known] = []
        self.ids: set[str] = set()
        self.seeds = 0

    @initialize(blocks=st.integers(2, 12))
    def build(self, blocks: int) -> None:
        self.blocks = blocks
        host = new_slab(self.host_blocks * BLOCK) if self.host_blocks else None
        self.pool = Pool(new_slab(blocks * BLOCK), BLOCK, LEASE_S, lambda: self.now, host)

    # --- the model ---

    def item(self, name: str) -> Known | None:
        return next((known for known in self.all if known.listed and known.stored.identifier == name), None)

    def use(self, known: Known) -> None:
        self.turn += 1
        known.used = self.turn

    def end_pins(self) -> None:
        for known in self.all:
            known.pins = {claim: end for claim, end in known.pins.items() if self.now < end}
        self.forget()

    def forget(self) -> None:
        self.all = [known for known in self.all if known.listed or known.pins]

    def victims(self, blocks: int) -> list[Known] | None:
        """Who goes for ``blocks`` blocks in a pool of one tier; None where that is not enough."""
        missing = blocks - (self.blocks - sum(known.blocks for known in self.all))
        free = [known for known in self.all if known.listed and not known.pins]
        order = sorted((k for k in free if self.now >= k.until), key=lambda k: k.used)
        order += sorted((k for k in free if self.now < k.until and k.read), key=lambda k: k.used)
        gone = []
        for known in order:
            if missing <= 0:
                break
            gone.append(known)
            missing -= known.blocks
        return gone if missing <= 0 else None

    # --- what may happen ---

    @rule(name=NAMES, size=st.one_of(st.integers(1, 3 * WORDS), st.integers(1, 14 * WORDS)))
    def put(self, name: str, size: int) -> None:
        self.seeds += 1
        content = torch.randn(size, 1, generator=torch.Generator().manual_seed(self.seeds))
        blocks = -(-size * 4 // BLOCK)
        outcome = self.pool.put(name, content)
        most = max(self.blocks, self.host_blocks)
        if blocks > most:
            assert outcome is Refusal.TOO_LARGE
            return
        self.end_pins()
        gone = self.victims(blocks)
        if not self.host_blocks:
            assert (outcome is Refusal.NOT_STORED) == (gone is None), (blocks, gone, outcome)
        if isinstance(outcome, Refusal):
            assert outcome is Refusal.NOT_STORED
            return
        if self.host_blocks:
            gone = [known for known in self.all if known.listed and not self.pool.contains(known.stored.identifier)]
            assert all(self.now >= known.until or known.read for known in gone), "lost under its lease, unread"
        assert not any(known.pins for known in gone or ()), "lost while it was read"
        for known in gone or ():
            known.listed = False
        old = self.item(name)
        if old is not None:
            old.listed = False
        self.forget()
        assert outcome.item_id not in self.ids, "an id that was given before"
        self.ids.add(outcome.item_id)
        known = Known(outcome, content, blocks, self.now + LEASE_S, 0)
        self.use(known)
        self.all.append(known)

    @rule(name=NAMES, hold_s=st.sampled_from([0.0, 1.0, 5.0]))
    def pin(self, name: str, hold_s: float) -> None:
        known = self.item(name)
        outcome = self.pool.pin(name, hold_s)
        if known is None:
            assert outcome is Refusal.UNKNOWN
            return
        assert not isinstance(outcome, Refusal)
        self.use(known)
        known.pins[outcome] = self.now + hold_s
        pinned = self.pool.pinned(outcome)
        assert pinned is not None
        known.stored = pinned if self.host_blocks else known.stored
        assert pinned == known.stored

    @precondition(lambda self: any(known.pins for known in self.all))
    @rule(data=st.data(), read=st.booleans())
    def unpin(self, data: st.DataObject, read: bool) -> None:
        claim, known = data.draw(st.sampled_from([(claim, known) for known in self.all for claim in known.pins]))
        assert self.pool.unpin(claim, read=read)
        del known.pins[claim]
        known.read = known.read or read
        self.forget()
        assert not self.pool.unpin(claim)

    @rule(name=NAMES, hold_s=st.sampled_from([0.0, 1.0, 4.0]))
    def keep(self, name: str, hold_s: float) -> None:
        known = self.item(name)
        assert (self.pool.keep(name, hold_s) is None) == (known is None)
        if known is not None:
            self.use(known)
            known.until = max(known.until, self.now + hold_s)
            known.read = False

    @rule(name=NAMES)
    def load(self, name: str) -> None:
        known = self.item(name)
        loaded = self.pool.load(name)
        assert (loaded is None) == (known is None)
        if known is not None and loaded is not None:
            self.use(known)
            assert torch.equal(loaded, known.content)

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        known = self.item(name)
        assert self.pool.drop(name) == (known is not None)
        if known is not None:
            known.listed = False
            self.forget()

    @rule(by=st.sampled_from([0.5, 1.0, 3.0, 11.0]))
    def pass_time(self, by: float) -> None:
        self.now += by

    @rule()
    def expire(self) -> None:
        over = sum(1 for known in self.all for end in known.pins.values() if self.now >= end)
        assert self.pool.expire() == over
        self.end_pins()

    @rule(bad=st.sampled_from([torch.zeros(3), torch.zeros(0, 3), torch.full((2, 2), float("nan"))]), name=NAMES)
    def put_nonsense(self, bad: torch.Tensor, name: str) -> None:
        assert self.pool.put(name, bad) in (Refusal.WRONG_SHAPE, Refusal.NON_FINITE)

    # --- what always holds ---

    def refreshed(self) -> bool:
        """The same items are kept as in the model, which learns where they are now."""
        if not hasattr(self, "pool"):
            return False
        assert len(self.pool) == sum(known.listed for known in self.all)
        owed = [known for known in self.all if known.listed and not known.pins and not known.read]
        assert self.pool._shelves.unread(self.now) == sum(self.now < known.until for known in owed)
        for known in self.all:
            if known.listed:
                found = self.pool.get(known.stored.identifier)
                assert found is not None, known.stored.identifier
                assert found.item_id == known.stored.item_id
                assert found == known.stored or not known.pins, "moved while it was read"
                known.stored = found
        return True

    @invariant()
    def no_block_belongs_to_two_and_none_is_lost(self) -> None:
        if not self.refreshed():
            return
        for tier in self.pool._shelves.tiers:
            taken: set[int] = set()
            for known in self.all:
                if known.stored.tier == tier.name:
                    blocks = {
                        block
                        for at, size in known.stored.runs
                        for block in range(at // BLOCK, -(-(at + size) // BLOCK))
                    }
                    assert len(blocks) == known.blocks
                    assert not blocks & taken, "shared by two items"
                    taken |= blocks
            assert len(taken) == tier.holes.count - tier.holes.free
            assert len(taken) * BLOCK == tier.used_bytes <= tier.capacity_bytes

    @invariant()
    def every_byte_is_as_published(self) -> None:
        if not self.refreshed():
            return
        slabs = {tier.name: tier.slab for tier in self.pool._shelves.tiers}
        for known in self.all:
            data = torch.cat([slabs[known.stored.tier][at : at + size] for at, size in known.stored.runs])
            assert torch.equal(data.view(torch.float32), known.content.view(-1)), known.stored.identifier
            assert checksum(data, known.stored.seed) == known.stored.checksum


class TwoTierMachine(PoolMachine):
    host_blocks = 6


TestOneTier = PoolMachine.TestCase
TestOneTier.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTwoTiers = TwoTierMachine.TestCase
TestTwoTiers.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
