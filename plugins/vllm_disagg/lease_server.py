"""Producer's end of the lease channel: answers claims from the book, in a thread of its own.

It runs in the process of the scheduler, which owns the blocks, so an answer is never older than the book.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable

from vllm_disagg.leases import LeaseBook
from vllm_disagg.protocol import (
    Answer,
    BadMessage,
    Claim,
    Done,
    Release,
    Renew,
    Request,
    frame,
    read_frame,
    request_decoder,
)
from vllm_suite.handoff import Refusal

logger = logging.getLogger("vllm.suite.disagg")

START_TIMEOUT_S = 5.0
# A consumer that is connected and silent for this long is dropped; it reconnects when it has something to say.
IDLE_TIMEOUT_S = 300.0


class LoopThread:
    """An asyncio event loop in a daemon thread, with a start and a stop that have deadlines."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def stop(self, timeout_s: float = 2.0) -> None:
        """Cancel what runs in the loop and end the thread."""
        if not self._thread.is_alive():
            return
        self.loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(timeout_s)

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.call_later(0.05 if tasks else 0, self.loop.stop)


def bind(host: str, port: int, what: str) -> socket.socket:
    """A listening TCP socket.

    Raises:
        OSError: the address is taken or not ours; the message says which setting to change.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(128)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise OSError(error.errno, f"{what} {host}:{port} cannot be opened: {error.strerror or error}") from error
    return sock


class LeaseServer:
    """Serves one :class:`LeaseBook` on ``host:port``; ``port`` 0 takes a free one (see :attr:`port`).

    Args:
        on_event: called from the server's thread when something happened that the scheduler should look at.
    """

    def __init__(self, book: LeaseBook, thread: LoopThread, host: str, port: int, on_event: Callable[[], None]) -> None:
        self._book = book
        self._on_event = on_event
        sock = bind(host, port, "lease port")
        self.port: int = sock.getsockname()[1]
        self.bad_messages = 0
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, sock=sock), thread.loop)
        self._server = starting.result(START_TIMEOUT_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                message = await asyncio.wait_for(read_frame(reader, request_decoder), IDLE_TIMEOUT_S)
                writer.write(frame(self._answer(message)))
                await writer.drain()
        except BadMessage as error:
            self.bad_messages += 1
            peer = writer.get_extra_info("peername")
            logger.warning("lease channel: closing %s, which sent no message of ours: %s", peer, error)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            pass  # the consumer went away; its claims end by themselves
        except asyncio.CancelledError:
            pass  # shutting down; asyncio would log the cancellation of a connection's task as an error
        finally:
            writer.close()

    def _answer(self, message: Request) -> Answer:
        now = time.monotonic()
        outcome: float | Refusal = 0.0
        match message:
            case Claim(ref=ref, holder=holder, hold_s=hold_s, consumer=consumer):
                outcome = self._book.claim(ref, holder, hold_s, now, consumer)
            case Renew(request_id=request_id, holder=holder, hold_s=hold_s, begin=begin):
                outcome = self._book.renew(request_id, holder, hold_s, now, begin)
                if begin:
                    self._on_event()
            case Release(request_id=request_id, holder=holder):
                self._book.release(request_id, holder)
                self._on_event()
            case Done():
                self._on_event()
        if isinstance(outcome, Refusal):
            return Answer(message.seq, refusal=outcome.value)
        return Answer(message.seq, hold_s=outcome)
