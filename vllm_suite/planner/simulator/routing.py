"""The router before the pools: which instance a leg of a request goes to (vllm_suite/router/policies.py)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from vllm_suite.planner.plan import Role
from vllm_suite.planner.simulator.handover import Leases, Place
from vllm_suite.planner.simulator.instances import Hosted


@dataclass(eq=False)
class Member:
    """An instance as the router sees it.

    Attributes:
        tokens, requests: outstanding, which the router charges when it sends a leg and takes back at its end.
        draining: it gets nothing new.
        since, until: seconds between which it is a member.
    """

    role: Role
    place: Place
    tokens: int = 0
    requests: int = 0
    draining: bool = False
    since: float = 0.0
    until: float = float("inf")

    def charge(self, tokens: int) -> None:
        """A leg was sent here."""
        self.tokens += tokens
        self.requests += 1

    def discharge(self, tokens: int) -> None:
        """It ended."""
        self.tokens -= tokens
        self.requests -= 1


class PrefixHistory:
    """Beginnings of prompts that an instance has answered, as the router remembers them, newest kept.

    Args:
        tokens: how many.
    """

    def __init__(self, tokens: int) -> None:
        self._left = tokens
        # Tokens of a block by a hash of all ids up to its own.
        self._known: OrderedDict[int, int] = OrderedDict()

    def add(self, prefix: tuple[int, ...], block: int) -> None:
        """A prompt is answered that begins with these blocks of so many tokens."""
        known, chain = self._known, 0
        for id_ in prefix:
            chain = hash((chain, id_))
            if chain in known:
                known.move_to_end(chain)
            else:
                known[chain] = block
                self._left -= block
        while self._left < 0:
            self._left += known.popitem(last=False)[1]

    def matched(self, prefix: tuple[int, ...]) -> int:
        """Tokens at the start that are remembered."""
        known, chain, tokens = self._known, 0, 0
        for id_ in prefix:
            chain = hash((chain, id_))
            if chain not in known:
                break
            tokens += known[chain]
        return tokens


@dataclass(eq=False)
class Instance(Member):
    """A prefill, decode or `any` instance.

    Attributes:
        engine: what runs there.
        leases: of a prefill instance.
        history: of one that answers.
        transfers, transfer_bytes, transfer_seconds: pulls of this instance.
        waited: seconds that legs waited here, for their pull and for their first step.
    """

    engine: Hosted = field(init=False)
    leases: Leases | None = None
    history: PrefixHistory | None = None
    transfers: int = 0
    transfer_bytes: float = 0.0
    transfer_seconds: float = 0.0
    waited: float = 0.0

    @property
    def drained(self) -> bool:
        """No leg is here, and nobody has yet to fetch anything from here."""
        return not self.requests and not self.engine.kept


_M = TypeVar("_M", bound=Member)


class LeastTokens:
    """Fewest outstanding tokens, then requests; equal ones take turns: the router's default policy."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, members: Sequence[_M]) -> _M:
        """One of the members, of which there has to be one."""
        count = len(members)
        if count == 1:
            return members[0]
        self._turn += 1
        turn, best, least = self._turn, 0, (members[0].tokens, members[0].requests, -self._turn % count)
        for index in range(1, count):
            member = members[index]
            if member.tokens <= least[0]:
                load = (member.tokens, member.requests, (index - turn) % count)
                if load < least:
                    best, least = index, load
        return members[best]
