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
    Challenge,
    Claim,
    Granted,
    Hello,
    Refused,
    Release,
    Welcome,
    Where,
    answer_decoder,
    hello_mac,
    read_frame,
)
from vllm_suite.frames import BadMessage, frame
from vllm_suite.handoff import Handoff, Refusal
from vllm_suite.peer_channel import Patience, PeerChannel, Streams, Unfit

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


class Peer(PeerChannel[Answer]):
    """One producer's life.

    Attributes:
        remote: name of its NIXL agent, once connected.
        reads: reads from it that are under way; its memory is not forgotten before they end.
    """

    def __init__(self, place: Where, config: EpdConfig, me: Me, agent: Agent) -> None:
        patience = Patience(config.claim_timeout_s, config.peer_retry_s, config.peer_retry_max_s, IDLE_S)
        super().__init__(place.host, place.port, patience, logger, "epd")
        self.place = place
        self.remote = ""
        self.reads = 0
        self._config = config
        self._me = me
        self._agent = agent

    def forgettable(self, now: float) -> bool:
        return super().forgettable(now) and not self.reads

    async def claim(self, identifier: str, ref: Handoff | None, rows: int, wait_s: float) -> Granted | Refusal:
        """Pin an item, waiting ``wait_s`` for one that is not made yet."""
        place = self.place
        message = Claim(
            seq=self.next_seq(),
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
        answer = await self.ask(message, wait_s)
        if isinstance(answer, Granted | Refusal):
            return answer
        return Refusal.said(answer.refusal) if isinstance(answer, Refused) else Refusal.MALFORMED

    def release(self, granted: Granted, *, ok: bool) -> None:
        """End a claim; its answer does not matter."""
        self.tell(Release(self.next_seq(), granted.claim, ok))

    def read_ended(self) -> None:
        """One of ``reads`` is over; forget the producer's memory if its connection is gone too."""
        self.reads -= 1
        if self._writer is None:
            self._disconnect()

    def reset(self) -> None:
        """A read failed: the next claim makes new connections, of the channel and of NIXL."""
        self._disconnect()

    async def _connect(self) -> Streams:
        async with asyncio.timeout(self._config.connect_timeout_s):
            reader, writer = await super()._connect()
        try:
            await self._greet(reader, writer)
        except BaseException:
            writer.close()
            raise
        return reader, writer

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        challenge = await self._next(reader)
        if not isinstance(challenge, Challenge):
            raise BadMessage("no challenge")
        me = self._me
        hello = Hello(self.next_seq(), me.name, hello_mac(me.key, challenge.nonce, me.name))
        writer.write(frame(hello))
        welcome = await self._next(reader)
        if isinstance(welcome, Refused):
            raise Unfit(Refusal.said(welcome.refusal))
        if not isinstance(welcome, Welcome):
            raise BadMessage("no welcome")
        for said, expected, refusal in (
            (welcome.producer, self.place.producer, Refusal.FOREIGN_PRODUCER),
            (welcome.epoch, self.place.epoch, Refusal.STALE_EPOCH),
            (welcome.model, me.model, Refusal.FOREIGN_MODEL),
            (welcome.layout, me.layout, Refusal.FOREIGN_LAYOUT),
        ):
            if said != expected:
                raise Unfit(refusal)
        try:
            self.remote = self._agent.add_remote(welcome.agent_metadata)
        except TransferError as error:
            raise OSError(str(error)) from error

    async def _next(self, reader: asyncio.StreamReader) -> Answer:
        answer: Answer = await read_frame(reader, answer_decoder)
        return answer

    def _unwanted(self, answer: Answer) -> None:
        """A pin would last for its whole time."""
        if isinstance(answer, Granted):
            self.release(answer, ok=True)

    def _disconnect(self) -> None:
        super()._disconnect()
        if self.remote and not self.reads:
            self._agent.forget(self.remote)
            self.remote = ""
