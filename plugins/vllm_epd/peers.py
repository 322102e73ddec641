"""The consumer's end of the item channel: one connection per producer, and how each behaved lately.

Everything runs in one event loop. Every wait ends; a producer that did not answer is not asked again for a while, so
it costs each request nothing until then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

from vllm_epd.agent import Agent, TransferError
from vllm_epd.config import EpdConfig
from vllm_suite.encoded import (
    Answer,
    BadMessage,
    Challenge,
    Claim,
    Granted,
    Hello,
    Refused,
    Release,
    Request,
    Welcome,
    Where,
    answer_decoder,
    frame,
    hello_mac,
    read_frame,
)
from vllm_suite.handoff import Handoff, Refusal

logger = logging.getLogger("vllm.suite.epd")

# A connection unused for this long is closed and its producer's memory forgotten.
IDLE_S = 240.0


@dataclass(frozen=True, slots=True)
class Me:
    """What this consumer says of itself: its name, the fleet's key, and the digests that must be equal."""

    name: str
    key: bytes | None
    model: str
    layout: str


class _Unfit(Exception):
    """The producer answered, and is not the one that was asked for."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal


class Peers:
    """Every producer that was asked lately, by its life: a restart is another producer."""

    def __init__(self, config: EpdConfig, me: Me, agent: Agent) -> None:
        self._config = config
        self._me = me
        self._agent = agent
        self._peers: dict[Where, Peer] = {}

    def at(self, place: Where) -> Peer:
        """The producer at ``place``; not connected yet where it is new."""
        peer = self._peers.get(place)
        if peer is None:
            now = time.monotonic()
            for old in [p for p in self._peers.values() if p.forgettable(now)]:
                del self._peers[old.place]
                old.close()
            peer = self._peers[place] = Peer(place, self._config, self._me, self._agent)
        return peer

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()


class Peer:
    """One producer's life.

    Attributes:
        remote: name of its NIXL agent, once connected.
        reads: reads from it that are under way; its memory is not forgotten before they end.
    """

    def __init__(self, place: Where, config: EpdConfig, me: Me, agent: Agent) -> None:
        self.place = place
        self.remote = ""
        self.reads = 0
        self._config = config
        self._me = me
        self._agent = agent
        self._seq = 0
        self._failures = 0
        self._retry_at = 0.0
        self._last_used = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._connecting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    def forgettable(self, now: float) -> bool:
        """Nothing under way and unused for as long as a failure is remembered."""
        idle = now - self._last_used > max(IDLE_S, self._config.peer_retry_max_s)
        return idle and not self._waiting and not self.reads

    async def claim(self, identifier: str, ref: Handoff | None, rows: int, wait_s: float) -> Granted | Refusal:
        """Pin an item, waiting ``wait_s`` for one that is not made yet."""
        place = self.place
        self._seq += 1
        message = Claim(
            seq=self._seq,
            identifier=identifier,
            ref=ref,
            producer=place.producer,
            epoch=place.epoch,
            model=self._me.model,
            layout=self._me.layout,
            rows=rows,
            wait_s=wait_s,
            hold_s=self._config.hold_s,
        )
        answer = await self._ask(message, wait_s)
        if isinstance(answer, Granted | Refusal):
            return answer
        return _known(answer.refusal) if isinstance(answer, Refused) else Refusal.MALFORMED

    def release(self, granted: Granted, *, ok: bool) -> None:
        """End a claim; its answer does not matter."""
        if self._writer is not None:
            self._seq += 1
            self._writer.write(frame(Release(self._seq, granted.claim, ok)))

    def read_ended(self) -> None:
        """One of ``reads`` is over; forget the producer's memory if its connection is gone too."""
        self.reads -= 1
        if self._writer is None:
            self._disconnect()

    def reset(self) -> None:
        """A read failed: the next claim makes new connections, of the channel and of NIXL."""
        self._disconnect()

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._disconnect()

    async def _ask(self, message: Claim, wait_s: float) -> Answer | Refusal:
        now = time.monotonic()
        self._last_used = now
        if self._failures and now < self._retry_at:
            return Refusal.PEER_DEAD
        if self._failures:
            self._retry_at = now + self._config.claim_timeout_s  # one probe at a time
        try:
            async with asyncio.timeout(self._config.claim_timeout_s + wait_s):
                answer = await self._exchange(message)
        except TimeoutError:
            self._failed("no answer")
            return Refusal.CLAIM_TIMEOUT
        except _Unfit as error:
            return error.refusal
        except (OSError, asyncio.IncompleteReadError, BadMessage, TransferError) as error:
            self._failed(str(error) or type(error).__name__)
            return Refusal.PEER_DEAD
        self._failures = 0
        return answer

    async def _exchange(self, message: Claim) -> Answer:
        async with self._connecting:
            if self._writer is None:
                # The deadline of a greeting is that of any answer, however long the claim may wait afterwards.
                async with asyncio.timeout(self._config.claim_timeout_s):
                    await self._connect()
        assert self._writer is not None
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[message.seq] = future
        try:
            self._writer.write(frame(message))
            return await future
        except BaseException:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._unwanted(future.result())
            raise
        finally:
            if not future.done() or future.cancelled():
                self._waiting.pop(message.seq, None)

    async def _connect(self) -> None:
        async with asyncio.timeout(self._config.connect_timeout_s):
            reader, writer = await asyncio.open_connection(self.place.host, self.place.port)
        try:
            await self._greet(reader, writer)
        except BaseException:
            writer.close()
            raise
        self._writer = writer
        self._reading = asyncio.create_task(self._read(reader, writer))

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenge = await read_frame(reader, answer_decoder)
        if not isinstance(challenge, Challenge):
            raise BadMessage("no challenge")
        self._seq += 1
        me = self._me
        hello: Request = Hello(self._seq, me.name, hello_mac(me.key, challenge.nonce, me.name))
        writer.write(frame(hello))
        welcome = await read_frame(reader, answer_decoder)
        if isinstance(welcome, Refused):
            raise _Unfit(_known(welcome.refusal))
        if not isinstance(welcome, Welcome):
            raise BadMessage("no welcome")
        for said, expected, refusal in (
            (welcome.producer, self.place.producer, Refusal.FOREIGN_PRODUCER),
            (welcome.epoch, self.place.epoch, Refusal.STALE_EPOCH),
            (welcome.model, me.model, Refusal.FOREIGN_MODEL),
            (welcome.layout, me.layout, Refusal.FOREIGN_LAYOUT),
        ):
            if said != expected:
                raise _Unfit(refusal)
        self.remote = self._agent.add_remote(welcome.agent_metadata)

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error: Exception = ConnectionResetError("connection closed")
        try:
            while True:
                answer = await read_frame(reader, answer_decoder)
                future = self._waiting.pop(answer.seq, None) if not isinstance(answer, Challenge) else None
                if future is not None and not future.done():
                    future.set_result(answer)
                else:
                    self._unwanted(answer)
        except (OSError, asyncio.IncompleteReadError, BadMessage) as failure:
            error = failure
        finally:
            if self._writer is writer:
                self._disconnect()
            writer.close()
            waiting, self._waiting = self._waiting, {}
            for future in waiting.values():
                if not future.done():
                    future.set_exception(error)

    def _unwanted(self, answer: Answer) -> None:
        """Whoever asked has gone: a pin would last for its whole time."""
        if isinstance(answer, Granted):
            self.release(answer, ok=True)

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self.remote and not self.reads:
            self._agent.forget(self.remote)
            self.remote = ""

    def _failed(self, reason: str) -> None:
        pause = min(self._config.peer_retry_s * 2**self._failures, self._config.peer_retry_max_s)
        self._failures = min(self._failures + 1, 16)
        self._retry_at = time.monotonic() + pause
        logger.warning(
            "epd: producer at %s:%d failed (%s); not asked again for %.0f s",
            self.place.host, self.place.port, reason, pause,
        )  # fmt: skip
        self._disconnect()


def _known(value: str) -> Refusal:
    try:
        return Refusal(value)
    except ValueError:
        return Refusal.UNKNOWN
