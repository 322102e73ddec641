"""One connected socket of the control link: packets both ways, an outbox, and who is at the other end."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from vllm_epd.config import ConfigError
from vllm_epd.messages import MAX_PACKET, packets_of

# Packets waiting for a peer that does not read; the oldest are dropped beyond that, and counted.
MAX_OUTBOX = 4096
_CREDENTIALS = struct.Struct("3i")


class Channel:
    """One connected socket with an outbox; calls may come from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.open = True
        self.dropped = 0
        self._outbox: deque[bytes] = deque()
        self._lock = threading.Lock()

    def send(self, messages: Iterable[Any]) -> bool:
        """Queue and send what fits; False where something is left for `flush`."""
        with self._lock:
            self._outbox.extend(packets_of(messages))
            while len(self._outbox) > MAX_OUTBOX:
                self._outbox.popleft()
                self.dropped += 1
            return self._flush()

    def flush(self) -> bool:
        with self._lock:
            return self._flush()

    def _flush(self) -> bool:
        while self._outbox and self.open:
            try:
                self.sock.send(self._outbox[0])
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self.open = False
                break
            self._outbox.popleft()
        return True

    def receive(self) -> list[bytes]:
        """Every packet that is there now."""
        packets = []
        while self.open:
            try:
                packet = self.sock.recv(2 * MAX_PACKET)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                packet = b""
            if not packet:
                self.open = False
                break
            packets.append(packet)
        return packets

    def close(self) -> None:
        self.open = False
        self.sock.close()


def peer_uid(sock: socket.socket) -> int:
    """User of the process at the other end."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(raw)[1]
    return uid


def readable(sock: socket.socket) -> bool:
    """Whether something can be read now."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(0))


def connect(name: str) -> Channel:
    """The channel to a worker that listens under ``name``. Raises ConfigError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect("\0" + name)
        if peer_uid(sock) != os.getuid():
            raise ConfigError(f"EC control link {name}: another user's process listens there")
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"EC control link {name}: no worker of this engine listens on this host ({error.strerror or error}); "
            "SuiteECConnector needs all workers of one engine on the scheduler's host"
        ) from error
    return Channel(sock)
