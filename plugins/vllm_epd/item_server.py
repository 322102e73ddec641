"""The producer's end of the item channel: pins items for consumers, and answers routers about what is kept.

It runs in the worker's process, which owns the pool, so an answer is never older than the pool. Nothing polls: a
claim for an item that is still being encoded sleeps until the pool tells of it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import threading
from collections import Counter
from typing import Any, NamedTuple

from vllm_epd.agent import Agent
from vllm_epd.pool import Pool, Stored
from vllm_suite.encoded import (
    MAX_KEYS,
    MAX_MESSAGE_BYTES,
    Answer,
    BadMessage,
    Challenge,
    Claim,
    Granted,
    Hello,
    Kept,
    Probe,
    Producer,
    Refused,
    Release,
    Welcome,
    frame,
    hello_mac,
    item_content,
    item_location,
    read_frame,
    request_decoder,
)
from vllm_suite.handoff import VERSION, Handoff, Refusal
from vllm_suite.loop_thread import LoopThread, bind

logger = logging.getLogger("vllm.suite.epd")

START_TIMEOUT_S = 5.0
# A connection that says nothing for this long is closed; its other end opens a new one when it has something to say.
IDLE_TIMEOUT_S = 300.0
# From the opening of a connection to its greeting, and from the first byte of a message to its last.
GREETING_TIMEOUT_S = 5.0
FRAME_TIMEOUT_S = 5.0
# What is read of a connection that has not shown that it knows the fleet key.
GREETING_BYTES = 4096
MAX_CONNECTIONS = 1024
MAX_WAITING = 4096
MAX_HOLD_S = 60.0
MAX_WAIT_S = 600.0
# An encoding that failed is remembered for a claim that comes a moment too late.
FAILURE_MEMORY_S = 2.0
MAX_FAILURES = 1024


class Facts(NamedTuple):
    """Who produces: instance id, epoch, and the digests that consumers compare with their own."""

    producer: str
    epoch: str
    model: str
    layout: str


class ServerCounts(NamedTuple):
    """What happened since the last `ItemServer.take_counts`; by reason where it is a dictionary.

    ``released`` and ``given_up`` are claims that their holders ended, having read the item or not.
    """

    granted: int
    released: int
    given_up: int
    refused: dict[str, int]
    faults: dict[str, int]


class ItemServer:
    """Serves one pool on ``host:port``; ``port`` 0 takes a free one (see :attr:`port`).

    Args:
        agent: the pool's memory is registered with it.
        key: the fleet's key, or None: then whoever can connect may claim.
        host: bound, and told to others.
        thread: runs the server; not stopped by `close`.

    Raises:
        OSError: the address is taken or not ours.
    """

    def __init__(
        self, pool: Pool, agent: Agent, facts: Facts, key: bytes | None, host: str, port: int, thread: LoopThread
    ) -> None:
        self._pool = pool
        self._agent = agent
        self._metadata = agent.metadata()
        self._key = key
        self._loop = thread.loop
        sock = bind(host, port, "port of the item server (ec_connector_extra_config.suite.port)")
        self.host = host
        self.port: int = sock.getsockname()[1]
        self.facts = Producer(*facts, host=host, port=self.port)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._counts_lock = threading.Lock()
        self._waiting: dict[str, set[asyncio.Future[Refusal | None]]] = {}
        self._failed: dict[str, tuple[float, Refusal]] = {}
        self._connections: set[asyncio.Task[Any]] = set()
        self._closed = False
        pool.subscribe(self._heard)
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._accept, sock=sock), thread.loop)
        self._server = starting.result(START_TIMEOUT_S)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    @property
    def waiting(self) -> int:
        """Claims that wait for an item to be encoded."""
        return sum(len(futures) for futures in self._waiting.values())

    def take_counts(self) -> ServerCounts:
        """What happened since the last call."""
        with self._counts_lock:
            counts, self._counts = self._counts, Counter()

        def by(kind: str) -> dict[str, int]:
            return {label: number for (name, label), number in counts.items() if name == kind}

        plain = by("claims")
        return ServerCounts(
            plain.get("granted", 0), plain.get("released", 0), plain.get("given_up", 0), by("refused"), by("faults")
        )

    def close(self, timeout_s: float = 2.0) -> None:
        """Close the port and every connection, waiting claims included. Returns when that is done, or late."""
        if self._closed:
            return
        self._closed = True
        if self._loop.is_closed() or not self._loop.is_running():
            return
        closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
        try:
            closing.result(timeout_s)
        except TimeoutError:
            logger.warning("item server: some connections did not close within %.1f s", timeout_s)

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    # --- one connection ---

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._closed or len(self._connections) >= MAX_CONNECTIONS:
            self._count("faults", "too_many_connections")
            writer.close()
            return
        self._connections.add(task)
        connection = _Connection(self, reader, writer)
        try:
            await connection.run()
        except BadMessage as error:
            self._count("faults", "bad_message")
            peer = writer.get_extra_info("peername")
            logger.warning("item server: closing %s, which sent no message of ours: %s", peer, error)
        except TimeoutError:
            self._count("faults", "slow_peer")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the consumer went away; its claims end by themselves
        except asyncio.CancelledError:
            pass  # shutting down; asyncio would log the cancellation of a connection's task as an error
        finally:
            self._connections.discard(task)
            connection.end()

    def welcome(self, seq: int) -> Welcome:
        """The answer to a greeting."""
        f = self.facts
        return Welcome(seq, f.producer, f.epoch, f.model, f.layout, self._agent.name, self._metadata)

    def knows_key(self, nonce: bytes, hello: Hello) -> bool:
        """Whether a greeting proves the fleet key, or none is set."""
        return self._key is None or hmac.compare_digest(hello_mac(self._key, nonce, hello.name), hello.mac)

    # --- answers ---

    def now(self, message: Claim | Release | Probe) -> Answer | None:
        """The answer that can be given at once; None for a claim that has to wait for its item."""
        match message:
            case Claim():
                return self._claim(message)
            case Probe(seq=seq, identifiers=identifiers, hold_s=hold_s):
                return self._probe(seq, identifiers, min(max(hold_s, 0.0), MAX_HOLD_S))
            case Release(seq=seq, claim=claim, ok=ok):
                self._release(claim, ok)
                return Kept(seq, {})

    async def later(self, message: Claim) -> Answer:
        """The answer to a claim that waits for its item, at the latest after ``wait_s``."""
        wanted = self._waiting.setdefault(message.identifier, set())
        future: asyncio.Future[Refusal | None] = self._loop.create_future()
        wanted.add(future)
        try:
            answer = self._claim(message)  # it may have come before we listened
            if answer is None:
                async with asyncio.timeout(min(message.wait_s, MAX_WAIT_S)):
                    refusal = await future
                answer = self._refuse(message.seq, refusal) if refusal else self._claim(message)
        except TimeoutError:
            answer = None
        finally:
            wanted.discard(future)
            if not wanted and self._waiting.get(message.identifier) is wanted:
                del self._waiting[message.identifier]
        return answer or self._refuse(message.seq, Refusal.UNKNOWN)

    def _claim(self, claim: Claim) -> Answer | None:
        refusal = self._unfit(claim)
        if refusal is not None:
            return self._refuse(claim.seq, refusal)
        hold_s = min(max(claim.hold_s, 0.0), MAX_HOLD_S)
        pinned = self._pool.pin(claim.identifier, hold_s)
        if isinstance(pinned, Refusal):
            return self._absent(claim)
        stored = self._pool.pinned(pinned)
        refusal = Refusal.LEASE_LOST if stored is None else self._unlike(claim, stored)
        if stored is None or refusal is not None:
            self._pool.unpin(pinned, read=False)
            return self._refuse(claim.seq, refusal or Refusal.LEASE_LOST)
        self._count("claims", "granted")
        return Granted(
            seq=claim.seq,
            claim=pinned,
            rows=stored.rows,
            width=stored.width,
            dtype=stored.dtype,
            size=stored.size,
            seed=stored.seed,
            checksum=stored.checksum,
            runs=stored.addresses(),
            memory=stored.memory,
            device=stored.device,
            hold_s=hold_s,
        )

    def _unfit(self, claim: Claim) -> Refusal | None:
        """Why a claim cannot be meant for this producer, whatever the pool holds."""
        ref, own = claim.ref, self.facts
        if ref is not None and (refusal := ref.check_signature(self._key)) is not None:
            return refusal
        if claim.producer != own.producer or (ref is not None and ref.producer != own.producer):
            return Refusal.FOREIGN_PRODUCER
        if claim.epoch != own.epoch or (ref is not None and ref.epoch != own.epoch):
            return Refusal.STALE_EPOCH
        if claim.model != own.model or (ref is not None and ref.model != own.model):
            return Refusal.FOREIGN_MODEL
        if claim.layout != own.layout or (ref is not None and ref.layout != own.layout):
            return Refusal.FOREIGN_LAYOUT
        return None if ref is None else self._tampered(claim, ref)

    def _tampered(self, claim: Claim, ref: Handoff) -> Refusal | None:
        own = self.facts
        if ref.content != item_content(claim.identifier):
            return Refusal.FOREIGN_CONTENT
        issued = (
            ref.version == VERSION
            and ref.location == item_location(claim.identifier, own.host, own.port)
            and (ref.claim_host, ref.claim_port) == (own.host, own.port)
            and self._pool.item_number_known(ref.request_id)
        )
        if not issued:
            return Refusal.TAMPERED
        return Refusal.TRUNCATED if ref.tokens < claim.rows else None

    def _unlike(self, claim: Claim, stored: Stored) -> Refusal | None:
        """Why what is stored is not what the claim asks for."""
        if claim.rows > stored.rows:
            return Refusal.TRUNCATED
        if claim.ref is not None and claim.ref.tokens != stored.rows:
            return Refusal.TAMPERED
        return None

    def _absent(self, claim: Claim) -> Answer | None:
        failed = self._failed.get(claim.identifier)
        if failed is not None and self._loop.time() - failed[0] < FAILURE_MEMORY_S:
            return self._refuse(claim.seq, failed[1])
        if claim.wait_s > 0:
            return None
        # A reference proves that the item was here once.
        return self._refuse(claim.seq, Refusal.UNKNOWN if claim.ref is None else Refusal.EXPIRED)

    def _probe(self, seq: int, identifiers: tuple[str, ...], hold_s: float) -> Answer:
        if len(identifiers) > MAX_KEYS:
            raise BadMessage(f"{len(identifiers)} identifiers in one probe; the limit is {MAX_KEYS}")
        refs = {}
        for identifier in identifiers:
            stored = self._pool.keep(identifier, hold_s)
            if stored is not None:
                refs[identifier] = self.facts.reference(identifier, stored.item_id, stored.rows, hold_s, self._key)
        return Kept(seq, refs)

    def _release(self, claim: int, ok: bool) -> None:
        if not ok:
            self._pool.verify(claim)  # perhaps because the bytes were wrong: then nobody else shall get them
        self._count("claims", "released" if ok else "given_up")
        self._pool.unpin(claim, read=ok)

    def _refuse(self, seq: int, refusal: Refusal) -> Refused:
        self._count("refused", refusal.value)
        return Refused(seq, refusal.value)

    def _count(self, name: str, label: str) -> None:
        with self._counts_lock:
            self._counts[name, label] += 1

    def count_fault(self, fault: str) -> None:
        """A fault of some peer that was contained."""
        self._count("faults", fault)

    # --- news of the pool ---

    def _heard(self, identifier: str, refusal: Refusal | None) -> None:
        """From the runner's thread."""
        if self._closed or (refusal is None and identifier not in self._waiting and identifier not in self._failed):
            return
        try:
            self._loop.call_soon_threadsafe(self._wake, identifier, refusal)
        except RuntimeError:
            logger.debug("item server: its loop is closed")

    def _wake(self, identifier: str, refusal: Refusal | None) -> None:
        self._failed.pop(identifier, None)
        if refusal is not None:
            self._failed[identifier] = (self._loop.time(), refusal)
            while len(self._failed) > MAX_FAILURES:
                del self._failed[next(iter(self._failed))]
        for future in self._waiting.get(identifier, ()):
            if not future.done():
                future.set_result(refusal)


class _Connection:
    """One consumer or router. Claims that wait are tasks of their own; everything else is answered in order."""

    def __init__(self, server: ItemServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._server = server
        self._reader = reader
        self._writer = writer
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Greet, then answer until the other end goes away or misbehaves."""
        if not await self._greet():
            return
        while True:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                message = await read_frame(self._reader, request_decoder, frame_timeout_s=FRAME_TIMEOUT_S)
            if isinstance(message, Hello):
                raise BadMessage("a second greeting")
            answer = self._server.now(message)
            if answer is not None:
                await self._send(answer)
            elif self._server.waiting >= MAX_WAITING:
                self._server.count_fault("too_many_waiting")
                await self._send(Refused(message.seq, Refusal.NO_ROOM.value))
            else:
                task = asyncio.create_task(self._answer_later(message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _greet(self) -> bool:
        nonce = secrets.token_bytes(32)
        await self._send(Challenge(nonce))
        async with asyncio.timeout(GREETING_TIMEOUT_S):
            hello = await read_frame(self._reader, request_decoder, limit=GREETING_BYTES)
        if not isinstance(hello, Hello):
            raise BadMessage(f"{type(hello).__name__} before the greeting")
        if not self._server.knows_key(nonce, hello):
            self._server.count_fault("bad_key")
            await self._send(Refused(hello.seq, Refusal.BAD_SIGNATURE.value))
            return False
        await self._send(self._server.welcome(hello.seq))
        return True

    async def _answer_later(self, claim: Claim) -> None:
        try:
            await self._send(await self._server.later(claim))
        except (TimeoutError, ConnectionError):
            self._writer.close()

    async def _send(self, answer: Answer) -> None:
        data = frame(answer)
        if len(data) > MAX_MESSAGE_BYTES and isinstance(answer, Granted | Kept):
            self._server.count_fault("answer_too_long")
            data = frame(Refused(answer.seq, Refusal.TOO_LARGE.value))
        self._writer.write(data)
        async with asyncio.timeout(FRAME_TIMEOUT_S):
            await self._writer.drain()

    def end(self) -> None:
        """Close it, and forget the claims that wait."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()
