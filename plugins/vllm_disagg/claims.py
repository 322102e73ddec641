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
from vllm_disagg.protocol import (
    Answer,
    BadMessage,
    Claim,
    Done,
    Release,
    Renew,
    Request,
    answer_decoder,
    frame,
    read_frame,
)
from vllm_suite.handoff import Handoff, Refusal
from vllm_suite.loop_thread import LoopThread

logger = logging.getLogger("vllm.suite.disagg")


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
            claim.refusal = _known_refusal(outcome.refusal)
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


def _known_refusal(value: str) -> Refusal:
    try:
        return Refusal(value)
    except ValueError:
        return Refusal.UNKNOWN


class _Peer:
    """One connection, its unanswered messages, and how the producer behaved lately."""

    def __init__(self, key: PeerKey, config: DisaggConfig) -> None:
        self.key = key
        self.background: set[asyncio.Task[Answer | Refusal]] = set()
        self._config = config
        self._seq = 0
        self._failures = 0
        self._retry_at = 0.0
        self._last_used = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._connecting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def forgettable(self, now: float) -> bool:
        """Nothing under way and unused for as long as a failure is remembered."""
        return not self._waiting and now - self._last_used > max(300.0, self._config.peer_retry_max_s)

    async def ask(self, message: Request) -> Answer | Refusal:
        """Send and wait for the answer, at most ``claim_timeout_s``; a refusal when the producer is gone."""
        now = time.monotonic()
        self._last_used = now
        if self._failures and now < self._retry_at:
            return Refusal.PEER_DEAD
        if self._failures:
            self._retry_at = now + self._config.claim_timeout_s  # one probe at a time
        try:
            async with asyncio.timeout(self._config.claim_timeout_s):
                answer = await self._exchange(message)
        except TimeoutError:
            self._failed("no answer")
            return Refusal.CLAIM_TIMEOUT
        except (OSError, asyncio.IncompleteReadError, BadMessage) as error:
            self._failed(str(error) or type(error).__name__)
            return Refusal.PEER_DEAD
        self._failures = 0
        return answer

    async def _exchange(self, message: Request) -> Answer:
        async with self._connecting:
            if self._writer is None:
                reader, self._writer = await asyncio.open_connection(self.key.host, self.key.port)
                self._reading = asyncio.create_task(self._read(reader, self._writer))
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[message.seq] = future
        try:
            self._writer.write(frame(message))
            return await future
        finally:
            self._waiting.pop(message.seq, None)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error: Exception = ConnectionResetError("connection closed")
        try:
            while True:
                answer = await read_frame(reader, answer_decoder)
                future = self._waiting.get(answer.seq)
                if future is not None and not future.done():
                    future.set_result(answer)
        except (OSError, asyncio.IncompleteReadError, BadMessage) as failure:
            error = failure
        finally:
            writer.close()
            if self._writer is writer:
                self._writer = None
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)

    def _failed(self, reason: str) -> None:
        pause = min(self._config.peer_retry_s * 2**self._failures, self._config.peer_retry_max_s)
        self._failures = min(self._failures + 1, 16)
        self._retry_at = time.monotonic() + pause
        logger.warning(
            "lease channel: producer at %s:%d failed (%s); not asked again for %.0f s",
            self.key.host, self.key.port, reason, pause,
        )  # fmt: skip
        if self._writer is not None:
            self._writer.close()
            self._writer = None
