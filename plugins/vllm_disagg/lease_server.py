"""Producer's end of the lease channel: answers claims from the book, in a thread of its own.

It runs in the process of the scheduler, which owns the blocks, so an answer is never older than the book.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from vllm_disagg.leases import LeaseBook
from vllm_disagg.protocol import MAX_MESSAGE_BYTES, Answer, Claim, Done, Release, Renew, Request, request_decoder
from vllm_suite.frames import BadMessage, frame, read_frame
from vllm_suite.handoff import Refusal
from vllm_suite.loop_thread import LoopThread, bind

logger = logging.getLogger("vllm.suite.disagg")

START_TIMEOUT_S = 5.0
# A consumer that is connected and silent for this long is dropped; it reconnects when it has something to say.
IDLE_TIMEOUT_S = 300.0


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
                reading = read_frame(reader, request_decoder, limit=MAX_MESSAGE_BYTES)
                message = await asyncio.wait_for(reading, IDLE_TIMEOUT_S)
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
