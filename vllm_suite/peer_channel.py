"""A consumer's connection to one producer: its unanswered messages, and how the producer behaved lately.

Everything runs in one event loop. Every wait ends; a producer that did not answer is not asked again for a while, so
it costs each request nothing until then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar

from vllm_suite.frames import BadMessage, frame
from vllm_suite.handoff import Refusal

Answer = TypeVar("Answer")
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Patience(NamedTuple):
    """Seconds: how long an answer may take; the first and the longest pause before a producer that failed is asked
    again, each failure doubling it; how long an unused connection is remembered."""

    answer_s: float
    retry_s: float
    retry_max_s: float
    forget_s: float


class Unfit(Exception):
    """The producer answered, and is not the one that was asked for."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal


class PeerChannel(ABC, Generic[Answer]):
    """One producer's life.

    Args:
        log, channel: logger, and the channel's name in its lines.
    """

    def __init__(self, host: str, port: int, patience: Patience, log: logging.Logger, channel: str) -> None:
        self._host = host
        self._port = port
        self._patience = patience
        self._log = log
        self._channel = channel
        self._seq = 0
        self._failures = 0
        self._retry_at = 0.0
        self._last_used = time.monotonic()
        self._writer: asyncio.StreamWriter | None = None
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._connecting = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None

    # --- what a channel adds ---

    async def _connect(self) -> Streams:
        """A new connection. Raises OSError, BadMessage or Unfit."""
        return await asyncio.open_connection(self._host, self._port)

    @abstractmethod
    async def _next(self, reader: asyncio.StreamReader) -> Answer:
        """The next answer; its ``seq`` is that of its message."""

    def _unwanted(self, answer: Answer) -> None:
        """Whoever asked has gone."""

    def _disconnect(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    # --- what it is for ---

    def next_seq(self) -> int:
        """Number of the next message."""
        self._seq += 1
        return self._seq

    def forgettable(self, now: float) -> bool:
        """Nothing under way and unused for as long as a failure is remembered."""
        unused_s = now - self._last_used
        return not self._waiting and unused_s > max(self._patience.forget_s, self._patience.retry_max_s)

    def tell(self, message: Any) -> None:
        """Send where there is a connection; the answer does not matter."""
        if self._writer is not None:
            self._writer.write(frame(message))

    async def ask(self, message: Any, wait_s: float = 0.0) -> Answer | Refusal:
        """Send and wait for the answer, ``wait_s`` longer than for any; a refusal where the producer is gone."""
        now = time.monotonic()
        self._last_used = now
        if self._failures and now < self._retry_at:
            return Refusal.PEER_DEAD
        if self._failures:
            self._retry_at = now + self._patience.answer_s  # one probe at a time
        try:
            async with asyncio.timeout(self._patience.answer_s + wait_s):
                answer = await self._exchange(message)
        except TimeoutError:
            self._failed("no answer")
            return Refusal.CLAIM_TIMEOUT
        except Unfit as error:
            return error.refusal
        except (OSError, UnicodeError, asyncio.IncompleteReadError, BadMessage) as error:
            # UnicodeError: a reference may name a host that can be none.
            self._failed(str(error) or type(error).__name__)
            return Refusal.PEER_DEAD
        self._failures = 0
        return answer

    def close(self) -> None:
        """End the connection."""
        if self._reading is not None:
            self._reading.cancel()
        self._disconnect()

    async def _exchange(self, message: Any) -> Answer:
        async with self._connecting:
            if self._writer is None:
                # The deadline of a connection is that of any answer, however long this one may take afterwards.
                async with asyncio.timeout(self._patience.answer_s):
                    reader, self._writer = await self._connect()
                self._reading = asyncio.create_task(self._read(reader, self._writer))
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

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        error: Exception = ConnectionResetError("connection closed")
        try:
            while True:
                answer = await self._next(reader)
                future = self._waiting.pop(getattr(answer, "seq", 0), None)
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

    def _failed(self, reason: str) -> None:
        pause = min(self._patience.retry_s * 2**self._failures, self._patience.retry_max_s)
        self._failures = min(self._failures + 1, 16)
        self._retry_at = time.monotonic() + pause
        self._log.warning(
            "%s: producer at %s:%d failed (%s); not asked again for %.0f s",
            self._channel, self._host, self._port, reason, pause,
        )  # fmt: skip
        self._disconnect()
