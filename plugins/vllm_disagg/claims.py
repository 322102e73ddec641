"""Consumer's end of the lease channel: claims references, keeps the claims alive, remembers dead producers.

The scheduler thread calls the public methods and never waits for the network; a loop thread does the talking.
A claim is asked for as soon as its request arrives, so the answer is normally there when the request's turn
comes. Every wait ends: no answer within ``claim_timeout_s`` is a refusal.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_disagg.config import DisaggConfig
from vllm_disagg.protocol import MAX_MESSAGE_BYTES, Answer, Claim, Done, Release, Renew, answer_decoder
from vllm_suite.frames import read_frame
from vllm_suite.handoff import Handoff, Refusal
from vllm_suite.loop_thread import LoopThread
from vllm_suite.peer_channel import Patience, PeerChannel

logger = logging.getLogger("vllm.suite.disagg")

# A connection unused for this long is forgotten.
FORGET_S = 300.0


class PeerKey(NamedTuple):
    """A producer's life. A restart is another peer, so an old failure never taints it."""

    host: str
    port: int
    epoch: str


@dataclass(slots=True)
class ClaimState:
    """One claim as the scheduler sees it.

    Attributes:
        ref: what is claimed.
        holder: nonce of this claim.
        until: own monotonic time until which the producer surely holds the blocks; 0 while unanswered.
        refusal: why not, once refused or lost.
        over: the request needs it no more.
        answered: set when the first answer, or its deadline, has passed.
    """

    ref: Handoff
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)
    until: float = 0.0
    refusal: Refusal | None = None
    over: bool = False
    answered: threading.Event = field(default_factory=threading.Event)

    @property
    def peer(self) -> PeerKey:
        return PeerKey(self.ref.claim_host, self.ref.claim_port, self.ref.epoch)


class Claims:
    """All claims of one engine, by its own request id.

    Args:
        consumer: this instance's id, for the producer's metrics.
    """

    def __init__(self, config: DisaggConfig, thread: LoopThread, consumer: str) -> None:
        self._config = config
        self._consumer = consumer
        self._thread = thread
        self._begun = 0  # talks the scheduler's thread began
        self._ended = 0  # talks the loop's thread ended, less those it began
        self._claims: dict[str, ClaimState] = {}
        self._peers: dict[PeerKey, _Peer] = {}
        self._renewal = asyncio.run_coroutine_threadsafe(self._renew_forever(), thread.loop)

    def start(self, request_id: str, ref: Handoff) -> None:
        """Ask the producer for ``ref`` on behalf of ``request_id``."""
        claim = ClaimState(ref)
        self._claims[request_id] = claim
        self._begun += 1
        asyncio.run_coroutine_threadsafe(self._claim(claim), self._thread.loop)

    def get(self, request_id: str) -> ClaimState | None:
        return self._claims.get(request_id)

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def talking(self) -> bool:
        """Some producer has not answered yet: the loop's thread needs the interpreter."""
        return self._begun != self._ended

    def begin(self, request_id: str) -> None:
        """The pull of a granted claim begins now: the producer must attend to its transfers."""
        claim = self._claims.get(request_id)
        if claim is not None:
            self._begun += 1
            talk = asyncio.run_coroutine_threadsafe(self._renew(claim, begin=True), self._thread.loop)
            talk.add_done_callback(self._talk_ended)

    def finish(self, request_id: str, *, pulled: bool) -> None:
        """The request needs its claim no more: tell the producer, whatever state the claim is in."""
        claim = self._claims.pop(request_id, None)
        if claim is None:
            return
        claim.over = True
        if claim.until:  # granted; an answer still under way is released when it comes
            self._begun += 1
            self._thread.loop.call_soon_threadsafe(self._say_goodbye, claim, pulled)

    def close(self) -> None:
        self._renewal.cancel()

    # --- in the loop thread ---

    def _peer(self, key: PeerKey) -> _Peer:
        peer = self._peers.get(key)
        if peer is None:
            now = time.monotonic()
            self._peers = {k: p for k, p in self._peers.items() if not p.forgettable(now)}
            peer = self._peers[key] = _Peer(key, self._config)
        return peer

    async def _claim(self, claim: ClaimState) -> None:
        peer = self._peer(claim.peer)
        sent = time.monotonic()
        message = Claim(peer.next_seq(), claim.ref, claim.holder, self._consumer, self._config.hold_s)
        outcome = await peer.ask(message)
        self._settle(claim, outcome, sent)
        claim.answered.set()
        self._ended += 1
        if claim.over and claim.until:
            self._ended -= 1
            self._say_goodbye(claim, pulled=False)

    def _settle(self, claim: ClaimState, outcome: Answer | Refusal, sent: float) -> None:
        if isinstance(outcome, Refusal):
            claim.refusal = outcome
        elif outcome.refusal:
            claim.refusal = Refusal.said(outcome.refusal)
        else:
            # From the sending: the producer counts from the receipt, which is later.
            claim.until = sent + outcome.hold_s - self._config.margin_s

    def _say_goodbye(self, claim: ClaimState, pulled: bool) -> None:
        peer = self._peer(claim.peer)
        kind = Done if pulled else Release
        task = self._thread.loop.create_task(peer.ask(kind(peer.next_seq(), claim.ref.request_id, claim.holder)))
        peer.background.add(task)
        task.add_done_callback(peer.background.discard)
        task.add_done_callback(self._talk_ended)

    def _talk_ended(self, _: object) -> None:
        self._ended += 1

    async def _renew_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.renew_s)
            live = [c for c in list(self._claims.values()) if c.until and not c.over and c.refusal is None]
            if live:
                self._ended -= 1
                await asyncio.gather(*(self._renew(claim) for claim in live))
                self._ended += 1

    async def _renew(self, claim: ClaimState, begin: bool = False) -> None:
        peer = self._peer(claim.peer)
        sent = time.monotonic()
        outcome = await peer.ask(Renew(peer.next_seq(), claim.ref.request_id, claim.holder, self._config.hold_s, begin))
        if isinstance(outcome, Refusal):
            return  # no answer: the claim stands until `until`, and the next round asks again
        if outcome.refusal:
            claim.refusal = Refusal.LEASE_LOST
        else:
            claim.until = max(claim.until, sent + outcome.hold_s - self._config.margin_s)


class _Peer(PeerChannel[Answer]):
    """The lease channel to one producer's life."""

    def __init__(self, key: PeerKey, config: DisaggConfig) -> None:
        patience = Patience(config.claim_timeout_s, config.peer_retry_s, config.peer_retry_max_s, FORGET_S)
        super().__init__(key.host, key.port, patience, logger, "lease channel")
        self.background: set[asyncio.Task[Answer | Refusal]] = set()

    async def _next(self, reader: asyncio.StreamReader) -> Answer:
        answer: Answer = await read_frame(reader, answer_decoder, limit=MAX_MESSAGE_BYTES)
        return answer
