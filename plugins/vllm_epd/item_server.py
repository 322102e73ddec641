"""The producer's end of the item channel: pins items for consumers, and tells routers what is kept.

It runs in the worker's process, which owns the pool, so an answer is never older than the pool. Nothing polls: a
claim for an item that is still being encoded sleeps until the pool tells of it.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from typing import Any, NamedTuple

from vllm_epd.agent import Agent
from vllm_epd.answers import Answers, ServerCounts, within
from vllm_epd.item_connection import Connection, Limits
from vllm_epd.pool import Pool
from vllm_suite.encoded import Claim, Granted, Hello, Producer, Refused, Welcome, hello_mac
from vllm_suite.frames import BadMessage
from vllm_suite.handoff import Refusal
from vllm_suite.loop_thread import LoopThread, bind

__all__ = ["Facts", "ItemServer", "Limits", "ServerCounts"]

logger = logging.getLogger("vllm.suite.epd")

START_TIMEOUT_S = 5.0


class Facts(NamedTuple):
    """Who produces: instance id, epoch, and the digests that consumers compare with their own."""

    producer: str
    epoch: str
    model: str
    layout: str


class ItemServer:
    """Serves one pool on ``host:port``; ``port`` 0 takes a free one (see :attr:`port`).

    Args:
        agent: the pool's memory is registered with it.
        key: the fleet's key, or None: then whoever can connect may claim.
        host: bound, and told to others.
        thread: runs the server; `close` does not stop it.

    Raises:
        OSError: the address is taken or not ours.
    """

    def __init__(
        self,
        pool: Pool,
        agent: Agent,
        facts: Facts,
        key: bytes | None,
        host: str,
        port: int,
        thread: LoopThread,
        limits: Limits | None = None,
    ) -> None:
        self._agent_name = agent.name
        self._metadata = agent.metadata()
        self._key = key
        self._loop = thread.loop
        self.limits = limits or Limits()
        sock = bind(host, port, "item port (ec_connector_extra_config.suite.host and .port)")
        self.host = host
        self.port: int = sock.getsockname()[1]
        self.facts = Producer(*facts, host=host, port=self.port)
        self.answers = Answers(pool, self.facts, key)
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
        return sum(len(futures) for futures in list(self._waiting.values()))

    def take_counts(self) -> ServerCounts:
        """What happened since the last call."""
        return self.answers.counts.take()

    def close(self, timeout_s: float = 2.0) -> None:
        """Close the port and every connection, with the claims that wait. Not from the loop's own thread."""
        if self._closed:
            return
        self._closed = True
        if not self._loop.is_running():
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

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        count = self.answers.counts.add
        if self._closed or len(self._connections) >= self.limits.connections:
            count("faults", "too_many_connections")
            writer.close()
            return
        self._connections.add(task)
        connection = Connection(self, reader, writer)
        peer = writer.get_extra_info("peername")
        try:
            await connection.run()
        except BadMessage as error:
            count("faults", "bad_message")
            logger.warning("item server: closing %s, which sent no message of ours: %s", peer, error)
        except TimeoutError:
            count("faults", "slow_peer")
            logger.warning("item server: closing %s, which left a message unfinished or unread", peer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the consumer went away; its claims end by themselves
        except asyncio.CancelledError:
            pass  # shutting down; asyncio would log the cancellation of a connection's task as an error
        finally:
            self._connections.discard(task)
            connection.end()

    def welcome(self, nonce: bytes, hello: Hello) -> Welcome | Refused:
        """The answer to a greeting, which has to prove the fleet key where one is set."""
        if self._key is not None and not hmac.compare_digest(hello_mac(self._key, nonce, hello.name), hello.mac):
            return self.answers.refuse(hello.seq, Refusal.BAD_SIGNATURE)
        f = self.facts
        return Welcome(hello.seq, f.producer, f.epoch, f.model, f.layout, self._agent_name, self._metadata)

    def claim(self, claim: Claim) -> Granted | Refused | None:
        """The answer to a claim; None where it has to wait for its item."""
        answer = self.answers.claim(claim)
        if answer is not None:
            return answer
        failed = self._failed.get(claim.identifier)
        if failed is not None and self._loop.time() - failed[0] < self.limits.failure_memory_s:
            return self.answers.refuse(claim.seq, failed[1])
        if not claim.wait_s > 0:
            return self.answers.absent(claim)
        if self.waiting >= self.limits.waiting:
            self.answers.counts.add("faults", "too_many_waiting")
            return self.answers.refuse(claim.seq, Refusal.NO_ROOM)
        return None

    async def wait_for(self, claim: Claim) -> Granted | Refused:
        """The answer to a claim once its item is stored, has failed, or its time is over."""
        wanted = self._waiting.setdefault(claim.identifier, set())
        news: asyncio.Future[Refusal | None] = self._loop.create_future()
        wanted.add(news)
        try:
            answer = self.answers.claim(claim)  # it may have come before we listened
            if answer is None:
                async with asyncio.timeout(within(claim.wait_s, self.limits.wait_s)):
                    refusal = await news
                answer = self.answers.claim(claim) if refusal is None else self.answers.refuse(claim.seq, refusal)
        except TimeoutError:
            answer = None
        finally:
            wanted.discard(news)
            if not wanted and self._waiting.get(claim.identifier) is wanted:
                del self._waiting[claim.identifier]
        return answer or self.answers.absent(claim)

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
        now = self._loop.time()
        while self._failed and now - next(iter(self._failed.values()))[0] >= self.limits.failure_memory_s:
            del self._failed[next(iter(self._failed))]
        if refusal is not None:
            self._failed[identifier] = (now, refusal)
        for news in self._waiting.get(identifier, ()):
            if not news.done():
                news.set_result(refusal)
