"""One connection of the item channel: reads messages, sends answers, and bounds what a bad peer costs."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol, TypeVar

from vllm_epd.answers import Answers
from vllm_suite.encoded import (
    MAX_MESSAGE_BYTES,
    Answer,
    Challenge,
    Claim,
    Granted,
    Hello,
    Kept,
    Probe,
    Refused,
    Release,
    Welcome,
    read_frame,
    request_decoder,
)
from vllm_suite.frames import BadMessage, Idle, frame
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.epd")

_Request = TypeVar("_Request", Claim, Release)

# Claims that one connection remembers before it looks which of them have ended by themselves.
MAX_OPEN_CLAIMS = 4096


class Limits(NamedTuple):
    """What one server takes from outside.

    Attributes:
        idle_s: a connection that says nothing and waits for nothing is closed; its other end opens a new one.
        greeting_s: from the opening of a connection to its greeting.
        frame_s: from the first byte of a message to its last, in both directions.
        greeting_bytes: what is read of a connection that has not shown that it knows the key.
        connections, waiting: at a time; ``waiting`` counts claims for items that are being encoded.
        wait_s: longest such wait.
        failure_memory_s: an encoding that failed is remembered for claims that come a moment later.
    """

    idle_s: float = 300.0
    greeting_s: float = 5.0
    frame_s: float = 5.0
    greeting_bytes: int = 4096
    connections: int = 1024
    waiting: int = 4096
    wait_s: float = 600.0
    failure_memory_s: float = 2.0


class Desk(Protocol):
    """What a connection needs of its server."""

    limits: Limits
    answers: Answers

    def welcome(self, nonce: bytes, hello: Hello) -> Welcome | Refused:
        """The answer to a greeting."""

    def claim(self, claim: Claim) -> Granted | Refused | None:
        """The answer to a claim; None where it has to wait for its item."""

    async def wait_for(self, claim: Claim) -> Granted | Refused:
        """The answer to a claim that waits."""


class Connection:
    """One consumer or router. What waits or computes has a task of its own; the rest is answered in order."""

    def __init__(self, desk: Desk, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._desk = desk
        self._reader = reader
        self._writer = writer
        self._tasks: set[asyncio.Task[None]] = set()
        # Claims granted here and not released here; nobody ends those of another connection.
        self._claims: set[int] = set()

    async def run(self) -> None:
        """Greet, then answer until the other end goes away or misbehaves."""
        limits = self._desk.limits
        if not await self._greet():
            return
        while True:
            try:
                message = await read_frame(
                    self._reader, request_decoder, idle_timeout_s=limits.idle_s, frame_timeout_s=limits.frame_s
                )
            except Idle:
                if self._tasks:
                    continue
                return
            match message:
                case Claim():
                    answer = self._desk.claim(message)
                    if answer is None:
                        self._begin(self._answer_later, message)
                    else:
                        await self._send(answer)
                case Probe():
                    await self._send(self._desk.answers.probe(message))
                case Hello():
                    raise BadMessage("a second greeting")
                case _:
                    self._begin(self._release, message)

    async def _greet(self) -> bool:
        limits, nonce = self._desk.limits, secrets.token_bytes(32)
        await self._send(Challenge(nonce))
        async with asyncio.timeout(limits.greeting_s):
            hello = await read_frame(self._reader, request_decoder, limit=limits.greeting_bytes)
        if not isinstance(hello, Hello):
            raise BadMessage(f"{type(hello).__name__} before the greeting")
        answer = self._desk.welcome(nonce, hello)
        await self._send(answer)
        return isinstance(answer, Welcome)

    def _begin(self, work: Callable[[_Request], Awaitable[None]], message: _Request) -> None:
        task = asyncio.create_task(self._guarded(work, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Callable[[_Request], Awaitable[None]], message: _Request) -> None:
        try:
            await work(message)
        except (TimeoutError, ConnectionError):
            self._writer.close()  # `run` meets the end of the stream
        except RuntimeError:  # torch's, while an item is compared with its checksum; its claim ends by itself
            logger.exception("item server: a message was not answered")
            self._desk.answers.counts.add("faults", "internal")
            self._writer.close()

    async def _answer_later(self, claim: Claim) -> None:
        await self._send(await self._desk.wait_for(claim))

    async def _release(self, message: Release) -> None:
        if message.claim in self._claims:
            self._claims.discard(message.claim)
            end = self._desk.answers.release
            if message.ok:
                end(message.claim, ok=True)
            else:  # compares the item's bytes with its checksum
                await asyncio.to_thread(end, message.claim, ok=False)
        await self._send(Kept(message.seq, {}))

    async def _send(self, answer: Answer) -> None:
        data = frame(answer)
        if len(data) > MAX_MESSAGE_BYTES and not isinstance(answer, Challenge):
            self._desk.answers.counts.add("faults", "answer_too_long")
            data = frame(Refused(answer.seq, Refusal.TOO_LARGE.value))
        elif isinstance(answer, Granted):
            if len(self._claims) >= MAX_OPEN_CLAIMS:
                self._claims = self._desk.answers.alive(self._claims)
            self._claims.add(answer.claim)
        self._writer.write(data)
        async with asyncio.timeout(self._desk.limits.frame_s):
            await self._writer.drain()

    def end(self) -> None:
        """Close it, and forget the claims that wait."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()
