"""Asking producers over the item channel which items they keep. See `vllm_suite.encoded` for the messages."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

from vllm_suite.encoded import (
    MAX_KEYS,
    Challenge,
    Hello,
    Kept,
    Probe,
    Refused,
    Welcome,
    answer_decoder,
    hello_mac,
    item_content,
    read_frame,
)
from vllm_suite.frames import BadMessage, frame
from vllm_suite.handoff import Handoff

_REST_S = 1.0  # a producer that failed is not asked again for so long
_MAX_CHANNELS = 1024


class Keeper(NamedTuple):
    """One life of a producer, and where its item channel is."""

    instance_id: str
    epoch: str
    host: str
    port: int


class ProbeFailed(Exception):
    """No usable answer; `reason` is a metric label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class EncodedClient:
    """One connection per producer, opened when first needed; `close` ends them all."""

    def __init__(self, key: bytes | None) -> None:
        self._key = key
        self._name = f"router-{os.urandom(4).hex()}"
        self._channels: dict[Keeper, _Channel] = {}
        self._resting: dict[Keeper, float] = {}
        self._closed = False

    async def kept(
        self, producer: Keeper, identifiers: Sequence[str], hold_s: float, timeout_s: float
    ) -> dict[str, Handoff]:
        """References of those items that the producer keeps, for at least `hold_s` from now.

        Raises `ProbeFailed` where it does not say so within `timeout_s`, is somebody else, or failed a moment ago.
        """
        now = asyncio.get_running_loop().time()
        if self._resting.get(producer, 0.0) > now:
            raise ProbeFailed("resting")
        try:
            async with asyncio.timeout(timeout_s):
                refs: dict[str, Handoff] = {}
                for start in range(0, len(identifiers), MAX_KEYS):
                    refs |= await self._ask(producer, tuple(identifiers[start : start + MAX_KEYS]), hold_s)
        except TimeoutError as exc:
            raise self._failed(producer, "timeout") from exc
        except (OSError, EOFError) as exc:  # a closed connection is an IncompleteReadError, an EOFError
            raise self._failed(producer, "disconnect") from exc
        except BadMessage as exc:
            raise self._failed(producer, "protocol") from exc
        return {name: ref for name, ref in refs.items() if self._right(producer, name, ref)}

    async def _ask(self, producer: Keeper, identifiers: tuple[str, ...], hold_s: float) -> dict[str, Handoff]:
        channel = self._channels.get(producer)
        if channel is not None and not channel.closed:
            try:
                return await channel.probe(identifiers, hold_s)
            except (OSError, EOFError):
                channel.close()  # producers close connections that were idle for long; a fresh one tells
        if self._closed:
            raise ConnectionResetError("closed")
        self._prune()
        channel = self._channels[producer] = _Channel(producer, self._key, self._name)
        return await channel.probe(identifiers, hold_s)

    def _right(self, producer: Keeper, identifier: str, ref: Handoff) -> bool:
        return (
            (ref.producer, ref.epoch) == producer[:2]
            and ref.content == item_content(identifier)
            and ref.check_signature(self._key) is None
        )

    def _failed(self, producer: Keeper, reason: str) -> ProbeFailed:
        channel = self._channels.pop(producer, None)
        if channel is not None:
            channel.close()
        self._resting[producer] = asyncio.get_running_loop().time() + _REST_S
        return ProbeFailed(reason)

    def _prune(self) -> None:
        now = asyncio.get_running_loop().time()
        self._resting = {producer: until for producer, until in self._resting.items() if until > now}
        self._channels = {producer: channel for producer, channel in self._channels.items() if not channel.closed}
        while len(self._channels) >= _MAX_CHANNELS:
            self._channels.pop(next(iter(self._channels))).close()

    def close(self) -> None:
        """Close every connection; questions in flight fail."""
        self._closed = True
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()


class _Channel:
    """A connection and the questions that are open on it."""

    def __init__(self, producer: Keeper, key: bytes | None, name: str) -> None:
        self._producer = producer
        self._key = key
        self._name = name
        self._seq = itertools.count(1)
        self._asked: dict[int, asyncio.Future[dict[str, Handoff]]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._opening = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self.closed = False

    async def probe(self, identifiers: tuple[str, ...], hold_s: float) -> dict[str, Handoff]:
        async with self._opening:
            if self._writer is None:
                self._writer = await self._open()
        seq = next(self._seq)
        answer: asyncio.Future[dict[str, Handoff]] = asyncio.get_running_loop().create_future()
        self._asked[seq] = answer
        try:
            self._writer.write(frame(Probe(seq, identifiers, hold_s)))
            await self._writer.drain()
            return await answer
        finally:
            self._asked.pop(seq, None)

    async def _open(self) -> asyncio.StreamWriter:
        if self.closed:
            raise ConnectionResetError("closed")
        reader, writer = await asyncio.open_connection(self._producer.host, self._producer.port)
        try:
            challenge = await read_frame(reader, answer_decoder)
            if not isinstance(challenge, Challenge):
                raise BadMessage("no challenge")
            writer.write(frame(Hello(0, self._name, hello_mac(self._key, challenge.nonce, self._name))))
            welcome = await read_frame(reader, answer_decoder)
            if not isinstance(welcome, Welcome):
                raise BadMessage("no welcome")
            if (welcome.producer, welcome.epoch) != self._producer[:2]:
                raise BadMessage("another producer answers here")
        except BaseException:
            writer.close()
            raise
        self._reading = asyncio.create_task(self._read(reader))
        return writer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        failure: BaseException = ConnectionResetError("closed")
        try:
            while True:
                answer = await read_frame(reader, answer_decoder)
                if not isinstance(answer, Kept | Refused):
                    raise BadMessage("not an answer to a probe")
                asked = self._asked.get(answer.seq)
                if asked is not None and not asked.done():
                    asked.set_result(answer.refs if isinstance(answer, Kept) else {})
        except (OSError, EOFError, BadMessage) as exc:
            failure = exc
        finally:
            self.close(failure)

    def close(self, failure: BaseException | None = None) -> None:
        self.closed = True
        if self._reading is not None and self._reading is not asyncio.current_task():
            self._reading.cancel()
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closing
                self._writer.close()
        for asked in self._asked.values():
            if not asked.done():
                asked.set_exception(failure or ConnectionResetError("closed"))
