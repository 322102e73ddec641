"""Items on their way through encoders, each once, whoever wants it: calls, retries, and who still waits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import aiohttp

from vllm_suite.router.encode.call import Rejected, Request, encode
from vllm_suite.router.encode.config import Encode
from vllm_suite.router.encode.cost import Costs
from vllm_suite.router.encode.gate import Gate
from vllm_suite.router.encode.known import Encoded, Known
from vllm_suite.router.encode.parts import Item
from vllm_suite.router.encode.spread import make_spread
from vllm_suite.router.errors import UpstreamFailure
from vllm_suite.router.headers import REQUEST_ID
from vllm_suite.router.members import Member
from vllm_suite.router.membership import Membership
from vllm_suite.router.metrics import RouterMetrics

Outcome = Encoded | UpstreamFailure | Rejected


@dataclass(eq=False, slots=True)
class Flight:
    """One item being encoded.

    `order` are the encoders in the order in which they are tried. `failures` counts attempts: an encoder that changes
    its role has begun nothing, and what it refuses is none.
    """

    item: Item
    request: Request
    order: list[Member]
    landed: asyncio.Future[Outcome]
    began: float
    waiters: int = 0
    tried: set[Member] = field(default_factory=set)
    failures: int = 0
    shard: _Shard | None = None

    @property
    def encoded(self) -> Encoded | None:
        """The result, where there is a good one by now."""
        found = self.landed.result() if self.landed.done() else None
        return found if isinstance(found, Encoded) else None

    @property
    def failure(self) -> UpstreamFailure | Rejected | None:
        """Why there is none, where that is settled by now."""
        found = self.landed.result() if self.landed.done() else None
        return None if isinstance(found, Encoded) else found


@dataclass(eq=False, slots=True)
class _Shard:
    """Items in one call."""

    member: Member
    flights: list[Flight]
    tokens: int
    task: asyncio.Task[None] | None = None


class Flights:
    """All items in flight in this router."""

    def __init__(
        self,
        settings: Encode,
        session: aiohttp.ClientSession,
        membership: Membership,
        metrics: RouterMetrics,
        costs: Costs,
        known: Known,
        key: bytes | None,
    ) -> None:
        self._settings = settings
        self._session = session
        self._membership = membership
        self._metrics = metrics
        self._costs = costs
        self._known = known
        self._key = key
        self._spread = make_spread(settings)
        self._flights: dict[str, Flight] = {}
        self._gates: WeakKeyDictionary[Member, Gate] = WeakKeyDictionary()
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()

    def book(self, request: Request, items: Sequence[Item], members: Sequence[Member]) -> list[Flight]:
        """A flight for each item, joined where the item is in flight already; `leave` each in the end.

        Items are distinct; `members`, the encoders that may be used, are never none.
        """
        new = [item for item in items if item.identity not in self._flights]
        began = asyncio.get_running_loop().time()
        for item, order in zip(new, self._spread.order(new, members), strict=True):
            landed: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            self._flights[item.identity] = Flight(item, request, order, landed, began)
            self._metrics.add(item.tokens, "encode_tokens", item.modality)
            self._metrics.encode_rate.add(item.tokens)
        flights = [self._flights[item.identity] for item in items]
        for flight in flights:
            flight.waiters += 1
            if flight.request is not request:
                self._metrics.count("encode_shared_items", flight.item.modality)
        self._send([(self._flights[item.identity], self._flights[item.identity].order[0]) for item in new])
        return flights

    def under_way(self, identity: str) -> bool:
        """Whether an item, or a slice, is being encoded for somebody."""
        return identity in self._flights

    def leave(self, flight: Flight) -> None:
        """Give up one's interest. A call in whose items nobody is interested any more is cut off."""
        flight.waiters -= 1
        if flight.waiters or flight.landed.done():
            return
        self._flights.pop(flight.item.identity, None)
        shard = flight.shard
        if shard is not None and shard.task is not None and not any(other.waiters for other in shard.flights):
            shard.task.cancel()

    async def close(self) -> None:
        """Cut off every call."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self, assigned: Sequence[tuple[Flight, Member]]) -> None:
        """Group by encoder and modality, in calls of bounded size."""
        groups: dict[tuple[Member, str], list[Flight]] = {}
        for flight, member in assigned:
            groups.setdefault((member, flight.item.modality), []).append(flight)
        for (member, _), flights in groups.items():
            # A prompt longer than the model's context would be refused whole. Half of it leaves room for what the
            # template adds and for estimates that are too low; what is refused nevertheless is sent one by one.
            most = (member.state.max_model_len or 1 << 40) // 2
            for shard in _cut(flights, self._settings.shard_items, most):
                self._start(member, shard)

    def _start(self, member: Member, flights: list[Flight]) -> None:
        shard = _Shard(member, flights, sum(flight.item.tokens for flight in flights))
        member.encode_tokens += shard.tokens
        for flight in flights:
            flight.shard = shard
            flight.tried.add(member)
        shard.task = asyncio.create_task(self._run(shard))
        self._tasks.add(shard.task)
        shard.task.add_done_callback(lambda task: self._ended(shard, task))

    def _ended(self, shard: _Shard, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        shard.member.encode_tokens -= shard.tokens
        for flight in shard.flights:
            # Cut off, or ended by a fault of our own: nobody may wait for what does not come.
            if flight.shard is shard and not flight.landed.done():
                self._land(flight, UpstreamFailure("cut_off", "the call was cut off"))
        if not task.cancelled() and task.exception() is not None:
            task.get_loop().call_exception_handler({"message": "an encode call failed", "exception": task.exception()})

    async def _run(self, shard: _Shard) -> None:
        settings, metrics, member = self._settings, self._metrics, shard.member
        loop = asyncio.get_running_loop()
        queued = loop.time()
        gate = self._gates.get(member)
        if gate is None:
            gate = self._gates[member] = Gate(settings.outstanding_tokens)
        try:
            await gate.enter(shard.tokens, settings.queue_s)
        except TimeoutError:
            # The encoders are behind. Another one's line is no shorter: the policy chose the shortest.
            metrics.count("upstream_errors", "encode", "queue")
            for flight in shard.flights:
                self._land(flight, UpstreamFailure("queue", "the encoders are busy", status=503))
            return
        started = loop.time()
        metrics.observe(started - queued, "encode_queue_seconds")
        member.charge(shard.tokens)
        try:
            flights = [flight for flight in shard.flights if flight.waiters]
            if flights:
                await self._call(member, flights)
        finally:
            gate.leave(shard.tokens)
            member.discharge(shard.tokens)
            metrics.observe(loop.time() - started, "encode_call_seconds")

    async def _call(self, member: Member, flights: list[Flight]) -> None:
        settings, metrics = self._settings, self._metrics
        items = [flight.item for flight in flights]
        request = flights[0].request
        headers = request.headers.copy()
        # One instance may get several calls of one request, and aborts by id.
        headers[REQUEST_ID] = f"{headers.get(REQUEST_ID, 'encode')}-e{next(self._numbers)}"
        metrics.count("picks", "encode", member.instance_id)
        metrics.add(sum(item.size for item in items), "encode_bytes", items[0].modality)
        results: Sequence[Encoded | UpstreamFailure]
        try:
            results = await encode(
                self._session, member, request, headers, items, settings.call_s, settings.answer_bytes, self._key
            )
        except Rejected as exc:
            if len(flights) == 1:
                metrics.count("upstream_errors", "encode", "rejected")
                self._land(flights[0], exc)
                return
            # One item spoils the call, or all are too many: each by itself shows which.
            metrics.recovered("encode_split", "rejected", member.instance_id)
            for flight in flights:
                self._start(member, [flight])
            return
        except UpstreamFailure as exc:
            if exc.kind in ("connect", "disconnect"):
                self._membership.suspect(member)
            elif exc.kind == "role":
                self._membership.refused(member)
            results = [exc] * len(flights)
        again: list[tuple[Flight, Member]] = []
        for flight, result in zip(flights, results, strict=True):
            if isinstance(result, Encoded):
                self._remember(flight, result)
                self._land(flight, result)
                continue
            metrics.count("upstream_errors", "encode", result.kind)
            flight.failures += result.kind != "role"
            other = next((m for m in flight.order if m.ready and m not in flight.tried), None)
            if other is None or flight.failures > settings.retries or not flight.waiters:
                self._land(flight, result)
                continue
            metrics.recovered("encode_retry", result.kind, member.instance_id)
            again.append((flight, other))
        self._send(again)

    def _remember(self, flight: Flight, result: Encoded) -> None:
        item, model = flight.item, flight.request.scope.model
        if item.whole is None:
            self._costs.learn(model, item, result.ref.tokens)
            self._known.put(item.identity, result)
        elif result.of:
            if item.piece is not None and item.piece.index == 0:
                self._costs.learn(model, item.whole, result.of)
            self._known.put(item.identity, result)
        else:  # it was not cut
            self._costs.learn(model, item.whole, result.ref.tokens)
            self._known.put(item.whole.identity, result)

    def _land(self, flight: Flight, outcome: Outcome) -> None:
        if self._flights.get(flight.item.identity) is flight:
            del self._flights[flight.item.identity]
        if not flight.landed.done():
            flight.landed.set_result(outcome)
            now = asyncio.get_running_loop().time()
            self._metrics.observe(now - flight.began, "encode_item_seconds")


def _cut(flights: list[Flight], most_items: int, most_tokens: int) -> list[list[Flight]]:
    shards: list[list[Flight]] = []
    tokens = 0
    for flight in flights:
        if not shards or len(shards[-1]) >= most_items or tokens + flight.item.prompt_tokens > most_tokens:
            shards.append([])
            tokens = 0
        shards[-1].append(flight)
        tokens += flight.item.prompt_tokens
    return shards
