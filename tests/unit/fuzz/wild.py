"""An instance whose state is in order and whose answers are any bytes, and a client that sends any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

_GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"  # comes before the answer, to those who expect it
STATE = {"ready": True, "draining": False, "models": ["tiny"], "max_model_len": 1024, "vllm": "0.32.0", "load": {}}


@dataclass
class Raw:
    """What goes over the wire in pieces; then the connection is closed, or left open where `hold` says so."""

    pieces: list[bytes]
    hold: bool = False


def json_answer(body: bytes, status: int = 200) -> Raw:
    """A whole and proper answer."""
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    return Raw([head + body], hold=True)


PLAIN = json_answer(b'{"choices": [{"text": "a"}], "kv_transfer_params": {"remote_block_ids": [[1]]}}')


@dataclass
class Wild:
    """Answers polls of its state as `state` says, and other requests with the next of `script`, else with `PLAIN`."""

    role: str
    state: Any = None
    script: deque[Raw] = field(default_factory=deque)
    requests: list[bytes] = field(default_factory=list)

    async def start(self) -> Wild:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.good = {**STATE, "instance_id": f"{self.role}-{port}", "epoch": "e1", "role": self.role}
        self.state = self.good
        return self

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while await self._once(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # cancelled by `stop` alone
        finally:
            writer.close()

    async def _once(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/suite/v1/state " in head:
            state = self.state if isinstance(self.state, bytes) else json.dumps(self.state).encode()
            answer = json_answer(state)
        else:
            self.requests.append(head + await self._body(head, reader))
            answer = self.script.popleft() if self.script else PLAIN
        for piece in answer.pieces:
            writer.write(piece)
            await writer.drain()
            # The next piece comes in a packet of its own.
            await asyncio.sleep(0)
        return answer.hold

    @staticmethod
    async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                return await reader.readexactly(int(line.split(b":")[1]))
        return b""


@dataclass
class Got:
    """What came back: everything until the end of the answer, or of the connection."""

    raw: bytes
    ended: bool

    @property
    def status(self) -> int | None:
        """None where no status line came."""
        line = self.raw.split(b"\r\n", 1)[0].split(b" ")
        return int(line[1]) if len(line) > 1 and line[0].startswith(b"HTTP/") and line[1].isdigit() else None

    @property
    def body(self) -> bytes:
        """After the first head, chunks taken apart as far as they are whole."""
        head, _, rest = self.raw.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return rest
        out = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            with contextlib.suppress(ValueError):
                out += rest[: int(size, 16)]
                rest = rest[int(size, 16) + 2 :]
                continue
            break
        return out


async def exchange(url: str, sent: list[bytes], deadline_s: float, *, hang_up: bool = False) -> Got:
    """Send pieces and read until the connection is closed; `hang_up` says after the last that nothing follows.

    `ended` is False where it was still open after `deadline_s`.
    """
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = b""
    try:
        async with asyncio.timeout(deadline_s):
            with contextlib.suppress(OSError):
                for piece in sent:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if hang_up:
                    writer.write_eof()
                while piece := await reader.read(65_536):
                    raw += piece
            return Got(raw.removeprefix(_GO_ON), True)
    except TimeoutError:
        return Got(raw.removeprefix(_GO_ON), False)
    finally:
        writer.close()
