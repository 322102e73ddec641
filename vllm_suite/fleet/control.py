"""The control socket of a running `up`: a Unix socket in its folder, for the user who runs it alone.

One order is one line of JSON, `{"order": ...}` with what `Work` takes. Answers are lines too: `{"say": text}`,
`{}` every few seconds, and `{"end": {...}}` last. A connection that ends before that takes the order back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SOCKET_FILE = "control.sock"
_LONGEST = 65_536
_ORDER_S = 5.0
_CLOSE_S = 0.5
_BEAT_S = 5.0
_SILENCE_S = 30.0
_PEER = struct.Struct("3i")  # pid, uid, gid

Work = Callable[[Any, Callable[[str], None], asyncio.Event], Awaitable[dict[str, Any]]]
"""Does an order: gets it, a way to say lines, and an event that is set once nobody wants it any more; gives the end."""


class NoFleet(RuntimeError):
    """There is no `up` to give an order to; the text says what was tried."""


class Control:
    """Serves the socket; an async context manager. The folder's lock has to be held."""

    def __init__(self, folder: Path, work: Work) -> None:
        self._folder = folder
        self._work = work
        self._descriptor = -1
        self._server: asyncio.Server | None = None
        self._busy = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Raises OSError where the folder takes no socket."""
        self._descriptor = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            path = _path(self._descriptor)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # of an `up` that was killed
            listening.bind(path)
            os.chmod(path, 0o600)  # nobody can connect before it listens
            self._server = await asyncio.start_unix_server(self._connected, sock=listening, limit=_LONGEST)
        except BaseException:
            listening.close()
            os.close(self._descriptor)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_path(self._descriptor))
        os.close(self._descriptor)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            end = await self._answer(reader, writer)
            _write(writer, {"end": end})
            with contextlib.suppress(OSError, TimeoutError):
                await writer.drain()
                writer.write_eof()
                # What is left unread when a socket is closed would cost the other side the answer.
                async with asyncio.timeout(_CLOSE_S):
                    while await reader.read(_LONGEST):
                        pass
        except asyncio.CancelledError:
            pass  # the fleet ends; asyncio would print the task's end as a defect
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> dict[str, Any]:
        peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        if _PEER.unpack(peer)[1] not in (os.getuid(), 0):
            return {"status": 1, "problem": "only the user who runs the fleet may do that"}
        try:
            line = await asyncio.wait_for(reader.readline(), _ORDER_S)
            order = json.loads(line)["order"]
        except (TimeoutError, ValueError, TypeError, KeyError, RecursionError, OSError):
            return {"status": 2, "problem": "no order in one line of JSON"}
        if self._busy:
            return {"status": 1, "problem": "another order is under way"}
        self._busy = True
        try:
            return await self._carried_out(order, reader, writer)
        finally:
            self._busy = False

    async def _carried_out(
        self, order: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> dict[str, Any]:
        unwanted = asyncio.Event()

        async def watch() -> None:
            with contextlib.suppress(OSError):
                await reader.read()
            unwanted.set()

        async def beat() -> None:
            while True:
                await asyncio.sleep(_BEAT_S)
                _write(writer, {})

        beside = [asyncio.create_task(watch()), asyncio.create_task(beat())]
        try:
            return await self._work(order, lambda text: _write(writer, {"say": text}), unwanted)
        except Exception as error:  # noqa: BLE001  whoever asked is told, and the fleet goes on
            return {"status": 1, "problem": f"a defect, or a full disk: {error!r}"}
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)


def give(folder: Path, order: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Send an order to the `up` of that folder; its answers, of which the last has `end`. Raises NoFleet."""
    try:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise NoFleet(f"no fleet in {folder}: {error.strerror}") from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(_SILENCE_S)
            connection.connect(_path(descriptor))
            connection.sendall(json.dumps({"order": order}).encode() + b"\n")
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NoFleet(
                f"no running fleet in {folder} takes orders: start one with `vllm-suite up`; one that was started "
                "takes them once it says `ready`"
            ) from error
        except OSError as error:
            raise NoFleet(f"the fleet in {folder} takes no order: {error.strerror}") from error
        finally:
            os.close(descriptor)
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    answer = json.loads(line)
                    yield answer
                    if "end" in answer:
                        return
        except (OSError, ValueError) as error:
            raise NoFleet(f"the fleet in {folder} does not answer: {error}") from error
    raise NoFleet(f"the fleet in {folder} has ended")


def _path(descriptor: int) -> str:
    # The address of a socket has 107 bytes; by way of the folder's descriptor that is enough for any folder.
    return f"/proc/self/fd/{descriptor}/{SOCKET_FILE}"


def _write(writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(document).encode() + b"\n")
