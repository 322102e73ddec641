"""The instances the router knows, and the choice among them.

A member is one incarnation of an instance: id and epoch. A restart makes another member with fresh counts and
an empty prefix history; requests still bound to the old one keep their own object until they end.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

from yarl import URL

from vllm_suite.router.config import Role
from vllm_suite.router.policies import Candidate, Demand, Policy


class ItemChannel(NamedTuple):
    """Where an instance serves its encoder outputs, and what its EC connector does (`ec_producer`, ...).

    `slices` are the modalities of which it encodes slices, `encodes` says whether it has an encoder.
    """

    host: str
    port: int
    role: str
    slices: tuple[str, ...] = ()
    encodes: bool = True


class Pulled(NamedTuple):
    """What an instance has pulled from a peer since its start: KV blocks (`kv`) or encoder outputs (`ec`)."""

    kind: Literal["kv", "ec"]
    peer: str
    bytes: float
    pulls: float | None


@dataclass(frozen=True, slots=True)
class State:
    """What an instance last said about itself."""

    instance_id: str
    epoch: str
    role: Role
    ready: bool
    models: tuple[str, ...]
    max_model_len: int | None = None
    load: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    ec: ItemChannel | None = None
    role_epoch: int = 0  # switches of its role since it started
    phase: str = "serving"  # of a switch; see `vllm_suite.roles.state`
    target: str | None = None  # of a switch that goes on
    pulled: tuple[Pulled, ...] = ()
    prefix_caching: bool = True  # what a stock instance has is not known; vLLM's default is to have it


class PrefixHistory:
    """Prompt starts that went through an instance, newest kept: a guess at what its prefix cache holds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: OrderedDict[int, None] = OrderedDict()

    def add(self, hashes: Iterable[int]) -> None:
        """Remember the chained chunk hashes of a prompt that was served."""
        chunks = self._chunks
        if not self._limit:
            return
        for value in hashes:
            chunks[value] = None
            chunks.move_to_end(value)
        while len(chunks) > self._limit:
            chunks.popitem(last=False)

    def matched(self, hashes: Iterable[int]) -> int:
        """How many leading chunks are remembered."""
        count = 0
        for value in hashes:
            if value not in self._chunks:
                break
            count += 1
        return count

    def __len__(self) -> int:
        return len(self._chunks)


class Member:
    """One admitted incarnation, with what the router has outstanding on it."""

    def __init__(self, url: str, state: State, role: Role, history_chunks: int) -> None:
        self.url = url
        self.state = state
        self.role: Role = role
        self.instance_id = state.instance_id
        self.epoch = state.epoch
        self.key = hash64(state.instance_id.encode())
        self.suspect = False
        self.reachable = True
        self.forgotten = False  # it is no member any more; requests that had chosen it choose again
        # When it last refused work that its role does not do: nothing goes to it before a later poll.
        self.refused_at: float | None = None
        self.outstanding_requests = 0
        self.outstanding_tokens = 0
        self.encode_tokens = 0  # sent to it or waiting for it in the encode stage
        self.history = PrefixHistory(history_chunks if state.prefix_caching else 0)
        base = URL(url)
        self.completions = base / "v1/completions"
        self.chat = base / "v1/chat/completions"
        self.models = base / "v1/models"

    @property
    def ready(self) -> bool:
        """Says it is ready, answered its last poll, and has failed no request since."""
        if self.forgotten or self.suspect or self.refused_at is not None:
            return False
        return self.state.ready and self.reachable

    @property
    def makes_items(self) -> bool:
        """Can encode media for others."""
        return self.state.ec is not None and self.state.ec.role in ("ec_producer", "ec_both")

    @property
    def has_encoder(self) -> bool:
        """Can take media as they are: a stock instance too, as far as is known."""
        return self.state.ec is None or self.state.ec.encodes

    @property
    def takes_items(self) -> bool:
        """Can use what others have encoded."""
        return self.state.ec is not None and self.state.ec.role in ("ec_consumer", "ec_both")

    def slices(self, modality: str) -> bool:
        """Can encode a slice of an item of this modality."""
        return self.state.ec is not None and modality in self.state.ec.slices

    def charge(self, tokens: int) -> None:
        """A request of so many tokens begins; `discharge` ends it."""
        self.outstanding_requests += 1
        self.outstanding_tokens += tokens

    def discharge(self, tokens: int) -> None:
        """Undo one `charge`."""
        self.outstanding_requests -= 1
        self.outstanding_tokens -= tokens

    def candidate(self) -> Candidate:
        """The immutable view that policies get."""
        waiting = self.state.load.get("waiting")
        return Candidate(
            self.instance_id,
            self.epoch,
            self.key,
            self.outstanding_requests,
            self.outstanding_tokens,
            waiting if isinstance(waiting, int) else 0,
        )


class Pool:
    """All members; single-threaded, changed by membership and read by requests."""

    def __init__(self) -> None:
        self._members: dict[tuple[str, str], Member] = {}
        self._sorted: tuple[Member, ...] = ()
        self._changed: asyncio.Future[None] | None = None

    @property
    def members(self) -> tuple[Member, ...]:
        """Every member, sorted by instance id."""
        return self._sorted

    def get(self, instance_id: str, epoch: str) -> Member | None:
        """The member with this identity, if it is known."""
        return self._members.get((instance_id, epoch))

    def admit(self, member: Member) -> None:
        """Add a member; its identity must be new."""
        identity = (member.instance_id, member.epoch)
        assert identity not in self._members, f"{identity} is a member already"
        self._members[identity] = member
        self._resort()

    def forget(self, member: Member) -> None:
        """Drop a member with its history and its counts."""
        member.forgotten = True
        self._members.pop((member.instance_id, member.epoch), None)
        self._resort()

    def notify(self) -> None:
        """Wake requests that wait for an instance: some readiness changed."""
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)
        self._changed = None

    async def wait_change(self, timeout_s: float) -> None:
        """Return at the next change of membership or readiness, or after `timeout_s`."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.wait([self._changed], timeout=timeout_s)

    def _resort(self) -> None:
        self._sorted = tuple(sorted(self._members.values(), key=lambda member: member.instance_id))
        self.notify()

    def eligible(self, roles: Container[str], model: str | None, excluded: Container[Member] = ()) -> list[Member]:
        """Members of these roles that may get new work and serve `model`.

        Those that are ready, or where there is none, those that only missed their last poll: a busy machine
        answers late, and until they are forgotten nothing better is known of them. An unknown model is left to
        the instances: vLLM's own 404 is the right answer to it, and an adapter may have been loaded since.
        """
        found = [member for member in self._sorted if member.role in roles and member not in excluded]
        able = [member for member in found if member.ready]
        if not able:
            able = [member for member in found if member.state.ready and not (member.suspect or member.refused_at)]
        if model is None or len(able) < 2:
            return able
        serving = [member for member in able if model in member.state.models]
        return serving or able


def pick(members: list[Member], policy: Policy, demand: Demand) -> Member | None:
    """The policy's choice among eligible members; None when there is none."""
    if len(members) < 2:
        return members[0] if members else None
    return members[policy.choose(tuple([member.candidate() for member in members]), demand)]


def hash64(data: bytes, previous: int = 0) -> int:
    """A stable 64-bit hash, chained through `previous`. For routing only, never for trust."""
    digest = blake2b(data, digest_size=8, salt=previous.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")
